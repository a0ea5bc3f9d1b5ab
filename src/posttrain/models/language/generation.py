"""Answers sampled from a policy, with a key-value cache. Only the logits of the newest token ever exist."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.models.kernels.choice import for_inference
from posttrain.models.language.drawing import Sampling, Step
from posttrain.models.language.growing import FixedAnswers, Growing, growing_answers, reads_prompts_packed
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.replayed import Replayed, replays


class Answer(NamedTuple):
    """tokens: with the end token, or the stop text, where `ended`. logps: of each token by what it was drawn
    from: the softmax at the temperature, of which top-k and top-p may have left a part. entropy: of the whole softmax, its mean
    over the tokens, in nats."""

    tokens: list[int]
    logps: list[float]
    ended: bool
    entropy: float


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
        growing = growing_answers(lm, [prompts[i] for i in chosen], samples, replays(lm, sampling))
        given = None if numbers is None else numbers[chosen].flatten(0, 1).to(lm.causal.device)
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
    step = Step(lm, growing, sampling)
    advance = Replayed(lm, growing, sampling) if isinstance(growing, FixedAnswers) else step
    number = torch.arange(len(growing.hidden))  # which answer each row of the batch is
    alive = torch.ones(len(number), dtype=torch.bool)
    written: list[list[tuple[int, float, float]]] = [[] for _ in range(len(number))]
    figures = step.draw(growing.hidden, _column(numbers, 0, growing.hidden)).figures
    for done in range(1, sampling.max_new_tokens + 1):
        seen = figures.cpu()  # the one wait of a token
        for row in alive.nonzero()[:, 0].tolist():
            token, logp, entropy = seen[row].tolist()
            written[int(number[row])].append((int(token), logp, entropy))
        alive &= ~torch.isin(seen[:, 0].long(), ends)
        if sampling.stop:
            for row in alive.nonzero()[:, 0].tolist():
                alive[row] = not sampling.stops([token for token, *_ in written[int(number[row])]])
        if not alive.any() or done == sampling.max_new_tokens:
            break
        tokens = figures[:, :1].long()
        if int(alive.sum()) <= growing.keeps_at * len(alive):
            kept = alive.nonzero()[:, 0]
            number, alive, kept = number[kept], alive[kept], kept.to(tokens.device)
            tokens, numbers = tokens[kept], None if numbers is None else numbers[kept]
            growing.keep(kept)
        figures = advance(tokens, _column(numbers, done, tokens)).figures
    return [_answer(steps, ends, sampling) for steps in written]


def _column(numbers: Tensor | None, step: int, like: Tensor) -> Tensor:
    """A random number for each row of `like`: float64 [n, 1]."""
    if numbers is None:
        return torch.rand(len(like), 1, dtype=torch.float64, device=like.device)
    return numbers[:, step, None]


def _answer(steps: list[tuple[int, float, float]], ends: Tensor, sampling: Sampling) -> Answer:
    tokens, logps, entropies = (list(column) for column in zip(*steps, strict=True))
    return Answer(tokens, logps, tokens[-1] in ends.tolist() or sampling.stops(tokens), sum(entropies) / len(entropies))
