"""Reward models: a body that reads packs, and a head that gives an answer one number at its end of turn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from posttrain.batch import PackedBatch
from posttrain.config.choices import Kernels
from posttrain.models.language.architecture import classifier_of
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reading import Packing
from posttrain.models.peft.export import WEIGHTS
from posttrain.models.peft.kinds import kind_of
from posttrain.models.peft.tokens import drop_layer
from posttrain.runs.artifact import HEAD_FILE
from posttrain.tensors import whole

HEAD = "score"  # the head's name in transformers' classes for sequence classification


class PackedScorer(PackedLM):
    """r = w h at the last token that counts, of every answer of a pack (Stiennon et al. 2020, arXiv 2009.01325).

    Saved as transformers' AutoModelForSequenceClassification with one label where there is such a class (`classifier_of`), else
    as the language model with the head in a file beside it. The language model's own head stays unused.
    """

    def __init__(self, model: nn.Module, attention: str = "auto", kernels: Kernels = "auto", packing: Packing = "auto") -> None:
        super().__init__(model, attention, kernels, packing)
        causal = self.causal
        output: Any = causal.get_output_embeddings()
        words: Any = causal.get_input_embeddings()
        shared = {id(p) for p in words.parameters()}
        for parameter in output.parameters():
            if id(parameter) not in shared:
                parameter.requires_grad_(False)
        width = causal.config.get_text_config().hidden_size
        self.score = nn.Linear(width, 1, bias=False, device=causal.device)
        # at random it would begin with an opinion on every pair, which a small set takes its whole length to unlearn
        nn.init.zeros_(self.score.weight)

    # a score has no spread over words, and no noise is trained into it
    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Scores: float32 [num_answers]."""
        hidden, ends = self.read(batch, batch.eos_index)
        return self.score(hidden[ends].float())[:, 0]

    def values(self, batch: PackedBatch) -> Tensor:
        """The head's value before each target, from which only its past is visible: float32 [N]."""
        hidden, source = self.read(batch, batch.logit_index)
        return self.score(hidden[source].float())[:, 0]

    def save(self, out_dir: Path, is_writer: bool) -> None:
        """A model directory, as the class says. Every process must call it; one of them writes."""
        classifier, head = classifier_of(self.causal.config), whole(self.score.weight)
        if classifier is None:
            super().save(out_dir, is_writer)
            if is_writer:
                _write_head(out_dir, head)
            return
        copies: dict[int, Tensor] = {}
        state = {n: copies.setdefault(id(p), whole(p)) for n, p in self.causal.state_dict(keep_vars=True).items()}
        state[f"{HEAD}.weight"] = head
        if is_writer:
            own = set(classifier.state_dict())
            classifier.config.architectures = [type(classifier).__name__]
            classifier.save_pretrained(out_dir, state_dict={name: value for name, value in state.items() if name in own})

    def save_adapter(self, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """An adapter directory: of body and head for AutoModelForSequenceClassification, or of the body with the head beside."""
        super().save_adapter(out_dir, base_path, is_writer)
        weight = whole(self.score.weight)
        if is_writer:
            if classifier_of(self.causal.config) is None:
                _write_head(out_dir, weight)
            else:
                output = self.causal.get_output_embeddings()
                _add_head(out_dir, weight, next(name for name, module in self.causal.named_modules() if module is output))

    def load_head(self, directory: Path) -> None:
        """Take the head of a saved reward model."""
        with torch.no_grad():
            self.score.weight.copy_(saved_head(directory))


def saved_head(directory: Path) -> Tensor:
    """w of the reward model saved in `directory` (adapter or whole model): float32 [1, H]. KeyError where it has none."""
    for file in sorted(directory.glob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (safe_open is no dict)
                if f".{name}".endswith(f".{HEAD}.weight"):
                    return tensors.get_tensor(name).float()
    raise KeyError(HEAD)


def padding_apart(tokenizer: Any, ends: list[int]) -> int | None:
    """Give the tokenizer a padding token that ends no answer, and return its id.

    transformers scores a sequence at its last token that is not padding: where padding is the end of turn, as many tokenizers
    have it, that would be the token before.
    """
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        special = [i for i, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special and i not in ends]
        if not special:
            return None
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(special[0])
    return tokenizer.pad_token_id


def _write_head(directory: Path, weight: Tensor) -> None:
    save_file({f"{HEAD}.weight": weight.contiguous()}, directory / HEAD_FILE, metadata={"format": "pt"})


def _add_head(directory: Path, weight: Tensor, language_head: str) -> None:
    """language_head: the layer that a classifier has not."""
    file = directory / "adapter_config.json"
    config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config |= {"task_type": "SEQ_CLS", "modules_to_save": [HEAD]}
    kind = kind_of(config)
    prefix = "base_model." if kind and kind.virtual else "base_model.model."
    config, tensors = drop_layer(language_head, config, load_file(directory / WEIGHTS))
    file.write_text(json.dumps(config, indent=2), encoding="utf-8")
    save_file(tensors | {f"{prefix}{HEAD}.weight": weight}, directory / WEIGHTS, metadata={"format": "pt"})
