"""`posttrain.load`: a result in memory, as Python asks for it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from posttrain.commands.words import runs_and_settings
from posttrain.data.collate import Group, pack_answers
from posttrain.errors import UserError
from posttrain.losses.tokens import answer_sums
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.loading import LoadedModel, device_here, load_model, scorer
from posttrain.models.language.packed_lm import PackedLM
from posttrain.training.seeding import row_seed

Prompt = str | list[dict[str, Any]]  # a text, or a conversation's messages
AT_ONCE = 16


@dataclass(frozen=True)
class Loaded:
    """A model in evaluation mode with its tokenizer. `live` has more of it: its encoder, the tokens that end an answer."""

    live: LoadedModel

    @property
    def model(self) -> Any:
        """Of transformers, or peft's around it."""
        return self.live.model

    @property
    def tokenizer(self) -> Any:
        """Of transformers."""
        return self.live.tokenizer

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        samples: int = 1,
        *,
        max_new_tokens: int = 256,
        temperature: float = 0.0,
        top_p: float = 1.0,
        stop: Sequence[str] = (),
        seed: int = 0,
    ) -> list[list[str]]:
        """`samples` answers to each prompt. temperature 0: the likeliest token. An answer depends on the seed, its prompt and its
        place alone. Texts are the user's words where the run's rows were conversations, and are gone on with where not."""
        if self.live.artifact.reward_head:
            raise UserError(f"{self.live.artifact.name} is a reward model: it scores, and cannot write")
        _check_how(samples, max_new_tokens, temperature, top_p, stop)
        tokens = [self._encoded(prompt) for prompt in _listed(prompts)]
        how = (temperature, top_p, 0) if temperature else (1.0, 1.0, 1)
        sampling = Sampling(max_new_tokens, *how, max(AT_ONCE, samples), tuple(stop), self._text)
        seeds = [row_seed(seed, i, 0, 0) for i in range(len(tokens))]
        if not tokens:
            return []
        drawn = sample(self._reader, tokens, samples, sampling, self.live.ends, seeds)
        return [[self._text(answer.tokens) for answer in group] for group in drawn]

    def score(self, prompts: Prompt | Sequence[Prompt], answers: str | Sequence[str]) -> list[float]:
        """What each answer to the prompt at its place is worth: a reward model's score, of others its log-prob in nats, with the
        token that ends it."""
        asked, said = _listed(prompts), [answers] if isinstance(answers, str) else list(answers)
        if len(asked) != len(said):
            raise UserError(f"score: {len(asked)} prompts and {len(said)} answers; give an answer to each prompt")
        found: list[float] = []
        for start in range(0, len(said), AT_ONCE):
            some = zip(asked[start : start + AT_ONCE], said[start : start + AT_ONCE], strict=True)
            found += self._scored([self._group(prompt, answer, i) for i, (prompt, answer) in enumerate(some)])
        return found

    @cached_property
    def _reader(self) -> PackedLM:
        if self.live.artifact.reward_head:
            return scorer(self.live)
        return PackedLM(self.live.model, kernels=self.live.kernels).eval()

    @torch.no_grad()
    def _scored(self, groups: list[Group]) -> list[float]:
        pack = pack_answers(groups).to(self.live.model.device)
        found = self._reader(pack)
        if not self.live.artifact.reward_head:
            found = answer_sums(found.float(), pack.sequence_id, len(groups))
        return found.float().tolist()

    def _group(self, prompt: Prompt, answer: str, number: int) -> Group:
        tokens = [*self.tokenizer(answer, add_special_tokens=False)["input_ids"], *self.live.ends[:1]]
        counts = np.ones(len(tokens), dtype=np.float32)
        return Group(np.array(self._encoded(prompt), np.int32), [(np.array(tokens, np.int32), counts)], number)

    def _encoded(self, prompt: Prompt) -> list[int]:
        """Rendered as the run's rows were."""
        if isinstance(prompt, str) and not self.live.is_chat:
            return self.live.encoder.encode_prompt({"prompt": prompt})
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
        return self.live.encoder.encode_prompt({"messages": messages})

    def _text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)


def open_loaded(run: str, words: list[str], device: str | None) -> Loaded:
    """See `posttrain.load`."""
    given, _, of_data = runs_and_settings([run, *words])
    if len(given) != 1:
        raise UserError(f"load: give one run; '{given[-1]}' is no data.KEY=VALUE")
    _check_device(device)
    return Loaded(load_model(given[0], device or device_here(), words=of_data))


def _check_device(name: str | None) -> None:
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"device: '{name}' is none that torch can use here ({str(error).splitlines()[0][:100]})") from None


def _check_how(samples: int, max_new_tokens: int, temperature: float, top_p: float, stop: Sequence[str]) -> None:
    for name, number in (("samples", samples), ("max_new_tokens", max_new_tokens)):
        if number < 1:
            raise UserError(f"{name}: {number}; give 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature: {temperature}; give 0 or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p: {top_p}; give a share above 0, at most 1")
    if isinstance(stop, str):
        raise UserError(f"stop: give a list of texts, as stop=[{stop!r}]")
    if not all(stop):
        raise UserError("stop: an empty text ends every answer; leave it out")
    if samples > 1 and not temperature:
        raise UserError("samples: with temperature 0 all answers are one; give a temperature, or samples=1")


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt, or several: a list of messages is one."""
    if isinstance(prompts, str):
        return [prompts]
    found: list[Any] = list(prompts) if isinstance(prompts, Sequence) else [prompts]
    found = [found] if found and isinstance(found[0], dict) else found
    if not all(isinstance(each, str) or _is_conversation(each) for each in found):
        raise UserError(
            'prompts: a text, a list of messages, or a list of these; a message is {"role": "user", "content": "..."}'
        )
    return found


def _is_conversation(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and all(isinstance(message, dict) for message in prompt)
