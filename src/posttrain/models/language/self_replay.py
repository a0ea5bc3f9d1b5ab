"""Self-replay: where there is no general corpus, the base model writes one (SPEC 1.1; Sun et al. 2020, arXiv 1909.03329)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config.choices import Kernels
from posttrain.config.schema import ReplayConfig
from posttrain.console import Meter
from posttrain.errors import UserError
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.runs.cache import cached_json

OPENINGS = ("<|endoftext|>", "<|end_of_text|>", "<|begin_of_text|>")  # what pre-training puts before a document


@dataclass(frozen=True)
class Replay:
    """Texts by the model at `source`, whose weights are named `digest`. ends: ids of tokens that end a text."""

    source: str
    revision: str | None
    digest: str
    tokenizer: Any
    ends: Sequence[int]
    options: ReplayConfig
    kernels: Kernels

    @property
    def name(self) -> str:
        """A hash of all that decides the texts."""
        said = [self.digest, self.tokenizer.backend_tokenizer.to_str(), self.options.model_dump(), self._opening]
        return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]

    def path(self, cache: Path) -> Path:
        """Where the texts are kept: the same for every run from the same weights."""
        return cache / "replay" / f"{self.name}.json"

    @property
    def _opening(self) -> int:
        """The token that a document begins after."""
        vocabulary = self.tokenizer.get_vocab()
        known = [vocabulary[text] for text in OPENINGS if text in vocabulary]
        added = self.tokenizer("x")["input_ids"][:1]
        first = added[0] if added and added[0] == self.tokenizer.bos_token_id else None
        found = [first, *known, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id]
        return next(token for token in found if token is not None)

    def texts(self, cache: Path, dtype: str, device: torch.device, code: str | None, check: Callable[[], None]) -> list[str]:
        """The texts, drawn if they are not there yet: once for all runs from these weights. check may raise to leave."""
        return cached_json(self.path(cache), lambda: self._draw(dtype, device, code, check))

    def _draw(self, dtype: str, device: torch.device, code: str | None, check: Callable[[], None]) -> list[str]:
        options = self.options
        model = load_causal(self.source, self.revision, dtype, str(device), code, None, "say")
        lm = PackedLM(model, kernels=self.kernels)
        sampling = Sampling(options.max_new_tokens, options.temperature, 1.0, 0, options.batch_size)
        ends = sorted({*self.ends, self._opening})
        texts, written, rounds = list[str](), 0, 0
        with Meter("self-replay", None) as meter:
            while written < options.tokens:
                torch.manual_seed(rounds)  # of the file, not of a run: it is shared
                answers = sample(lm, [[self._opening]], options.batch_size, sampling, ends)[0]
                written += sum(len(answer.tokens) for answer in answers)
                found = (self.tokenizer.decode(answer.tokens, skip_special_tokens=True).strip() for answer in answers)
                texts += [text for text in found if text]
                rounds += 1
                meter.advance(f"{written:,} of {options.tokens:,} tokens", by=len(answers))
                check()
                if rounds > 4 and not texts:
                    raise UserError("data.general.path: the base model writes nothing; give a general corpus")
        return texts
