"""Answers sampled from a policy, with a key-value cache. Only the logits of the newest token ever exist."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessorList, TopKLogitsWarper, TopPLogitsWarper

from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.models.kernels.choice import for_inference
from posttrain.models.language.growing import Growing, growing_answers, reads_prompts_packed
from posttrain.models.language.packed_lm import PackedLM


class Answer(NamedTuple):
    """tokens: with the end token, or the stop text, where `ended`. logps: of each token by what it was drawn
    from: the softmax at the temperature, of which top-k and top-p may have left a part. entropy: of the whole softmax, its mean
    over the tokens, in nats."""

    tokens: list[int]
    logps: list[float]
    ended: bool
    entropy: float


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


def draw(chances: Tensor, numbers: Tensor | None = None) -> Tensor:
    """float32 [n, V], rows that need not add up to 1 -> int64 [n, 1], with a random number for each row: those of `numbers`,
    float64 [n, 1] in [0, 1), or torch's global ones.

    The number drawn is above 0 and at most the row's sum; the token is the first one at which the cumulative sum reaches it. So a
    token of probability 0 is never drawn.
    """
    sums = chances.cumsum(-1, dtype=torch.float64)
    numbers = torch.rand_like(sums[:, :1]) if numbers is None else numbers.to(sums)
    return torch.searchsorted(sums, sums[:, -1:] * (1 - numbers))


@torch.no_grad()
def sample(
    lm: PackedLM,
    prompts: Sequence[Sequence[int]],
    samples: int,
    sampling: Sampling,
    ends: Sequence[int],
    seeds: Sequence[int] | None = None,
) -> list[list[Answer]]:
    """`samples` answers to each prompt, by torch's global random numbers; with `seeds`, one for each prompt, by such as do not
    depend on the other prompts. Prompts of like length are read together, each once."""
    lm.eval()
    shape = (samples, sampling.max_new_tokens)
    numbers = None if seeds is None else torch.stack([torch.from_numpy(np.random.default_rng(s).random(shape)) for s in seeds])
    found: dict[int, list[Answer]] = {}

    def write(chosen: list[int]) -> dict[int, list[Answer]]:
        growing = growing_answers(lm, [prompts[i] for i in chosen], samples)
        given = None if numbers is None else numbers[chosen].flatten(0, 1)
        answers = _draw_all(lm, growing, sampling, torch.tensor(ends), given)
        return {i: answers[k * samples : (k + 1) * samples] for k, i in enumerate(chosen)}

    with for_inference(lm, lm.report.kernels):
        for chosen in _groups(prompts, max(1, sampling.at_once // samples), alike=not reads_prompts_packed(lm)):
            for some in in_parts(write, chosen, in_two, "writing answers"):
                found |= some
    return [found[i] for i in range(len(prompts))]


def _groups(prompts: Sequence[Sequence[int]], size: int, alike: bool) -> Iterator[list[int]]:
    """Prompts that are answered together, those of like length first; alike: of one length only."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for _, group in groupby(by_length, (lambda i: len(prompts[i])) if alike else (lambda _: 0)):
        same = list(group)
        yield from (same[start : start + size] for start in range(0, len(same), size))


def _draw_all(lm: PackedLM, growing: Growing, sampling: Sampling, ends: Tensor, numbers: Tensor | None) -> list[Answer]:
    """numbers: float64 [n, max_new_tokens], of each answer."""
    output: Any = lm.causal.get_output_embeddings()
    head, hidden = lm.head.at(sampling.temperature), growing.hidden
    number = torch.arange(len(hidden))  # which answer each row of the batch is
    alive = torch.ones(len(hidden), dtype=torch.bool)
    drawn: list[list[tuple[int, float, float]]] = [[] for _ in range(len(hidden))]
    for step in range(sampling.max_new_tokens):
        logps = head.shaped(output(hidden).float()).log_softmax(-1)
        chances = sampling.allowed(logps)
        choice = draw(chances, None if numbers is None else numbers[number, step, None])
        kept = chances.sum(-1, keepdim=True).log() if sampling.cuts else 0.0
        entropies = -(logps.exp() * logps).sum(-1, keepdim=True)
        # the one wait of a token; its number is exact in 64 bits
        figures = torch.cat([choice.double(), (logps.gather(1, choice) - kept).double(), entropies.double()], 1).cpu()
        for row in alive.nonzero()[:, 0].tolist():
            token, logp, entropy = figures[row].tolist()
            drawn[int(number[row])].append((int(token), logp, entropy))
        alive &= ~torch.isin(figures[:, 0].long(), ends)
        if sampling.stop:
            for row in alive.nonzero()[:, 0].tolist():
                alive[row] = not sampling.stops([token for token, *_ in drawn[int(number[row])]])
        if not alive.any() or step + 1 == sampling.max_new_tokens:
            break
        if 4 * int(alive.sum()) <= 3 * len(alive):  # the cache is copied then: not for every answer that ends
            kept = alive.nonzero()[:, 0]
            number, alive, kept = number[kept], alive[kept], kept.to(choice.device)
            choice = choice[kept]
            growing.keep(kept)
        hidden = growing.grow(choice)
    return [_answer(steps, ends, sampling) for steps in drawn]


def _answer(steps: list[tuple[int, float, float]], ends: Tensor, sampling: Sampling) -> Answer:
    tokens, logps, entropies = (list(column) for column in zip(*steps, strict=True))
    return Answer(tokens, logps, tokens[-1] in ends.tolist() or sampling.stops(tokens), sum(entropies) / len(entropies))
