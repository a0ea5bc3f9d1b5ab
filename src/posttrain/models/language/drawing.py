"""How a token is drawn from what a model says of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from posttrain.models.language.growing import Growing
from posttrain.models.language.packed_lm import PackedLM


@dataclass(frozen=True)
class Sampling:
    """top_k 0 and top_p 1 cut nothing off. at_once: answers that grow together. stop: texts that end an answer, and stay in it;
    decode: token ids to text, which they are looked for in."""

    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    at_once: int
    stop: tuple[str, ...] = ()
    decode: Callable[[list[int]], str] | None = None

    def stops(self, tokens: list[int]) -> bool:
        """Does an answer end with the last of these tokens, by a stop text?"""
        if not self.stop or not self.decode:
            return False
        most = max(len(text.encode()) for text in self.stop)  # a token has a byte at least, but for special ones
        tail = self.decode(tokens[-most - 4 :])
        return any(text in tail for text in self.stop)

    @property
    def cuts(self) -> bool:
        """Is a part of the softmax cut off?"""
        return bool(self.top_k) or self.top_p < 1

    def allowed(self, logps: Tensor) -> Tensor:
        """float32 [n, V] -> the probabilities of the tokens that top-k and top-p keep, and 0 for the others."""
        cut: Any = LogitsProcessorList()
        if self.top_k:
            cut.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            cut.append(TopPLogitsWarper(self.top_p))
        return cut(None, logps).exp()


def draw(chances: Tensor, numbers: Tensor) -> Tensor:
    """float32 [n, V], rows that need not add up to 1 -> int64 [n, 1], by a random number for each row: float64 [n, 1] in [0, 1).

    The number drawn is above 0 and at most the row's sum; the token is the first one at which the cumulative sum reaches it. So a
    token of probability 0 is never drawn.
    """
    sums = chances.cumsum(-1, dtype=torch.float64)
    return torch.searchsorted(sums, sums[:, -1:] * (1 - numbers))


class Drawn(NamedTuple):
    """figures: float64 [n, 3]: the token, exact in 64 bits, its log-prob by what it was drawn from, and the entropy of the whole
    softmax. logps: float32 [n, V]."""

    figures: Tensor
    logps: Tensor


class Step:
    """A token of every answer: what the last one makes of the model's state, and the next one drawn by it."""

    def __init__(self, lm: PackedLM, growing: Growing, sampling: Sampling) -> None:
        self.output: Any = lm.causal.get_output_embeddings()
        self.head, self.growing, self.sampling = lm.head.at(sampling.temperature), growing, sampling

    def __call__(self, tokens: Tensor, numbers: Tensor) -> Drawn:
        """tokens: int64 [n, 1], the last of each answer. numbers: as `draw`'s."""
        return self.draw(self.growing.grow(tokens), numbers)

    def draw(self, hidden: Tensor, numbers: Tensor) -> Drawn:
        """By last hidden states [n, H]."""
        logps = self.head.shaped(self.output(hidden).float()).log_softmax(-1)
        chances = self.sampling.allowed(logps)
        choice = draw(chances, numbers)
        kept = chances.sum(-1, keepdim=True).log() if self.sampling.cuts else 0.0
        entropies = -(logps.exp() * logps).sum(-1, keepdim=True)
        return Drawn(torch.cat([choice.double(), (logps.gather(1, choice) - kept).double(), entropies.double()], 1), logps)
