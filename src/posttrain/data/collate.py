"""Units of examples -> one PackedBatch, and the order in which a run draws its units."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.batch import PackedBatch, Segment
from posttrain.data.examples import Examples


def pack(examples: Examples, units: Sequence[int]) -> PackedBatch:
    """Documents or conversations end to end; attention and positions never cross from one to the next.

    `loss_denominator` is the sum of the weights.
    """
    pieces = [(i, *examples.sequence(i)) for unit in units for i in examples.sequences(unit)]
    lengths = [len(tokens) for _, tokens, _ in pieces]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = np.concatenate([w for _, _, w in pieces])
    weights[starts[:-1]] = 0.0  # nothing predicts a first token
    target_at = np.flatnonzero(weights)
    tokens = np.concatenate([t for _, t, _ in pieces]).astype(np.int64)
    positions = np.concatenate([np.arange(n, dtype=np.int64) for n in lengths])
    owner = np.repeat(np.arange(len(pieces), dtype=np.int64), lengths)[target_at]
    kept = weights[target_at]
    ends = starts[1:] - 1
    ends[owner] = target_at  # of several in one answer the last one stays
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        segments=tuple(Segment(int(a), int(b)) for a, b in pairwise(starts)),
        logit_index=torch.from_numpy(target_at - 1),
        target=torch.from_numpy(tokens[target_at]),
        weight=torch.from_numpy(kept),
        sequence_id=torch.from_numpy(owner),
        eos_index=torch.from_numpy(ends),
        num_answers=len(pieces),
        rows=tuple(i for i, _, _ in pieces),
        loss_denominator=float(kept.sum()),
    )


def pack_pairs(examples: Examples, units: Sequence[int]) -> PackedBatch:
    """Each pair as prompt + chosen + rejected. `loss_denominator` is the sum of the pairs' weights."""
    groups = []
    for unit in units:
        ids, weights = examples.sequence(unit)
        prompt, chosen = (int(x) for x in examples.splits[unit])
        spans = (slice(prompt, chosen), slice(chosen, len(ids)))
        groups.append(Group(ids[:prompt], [(ids[span], weights[span]) for span in spans], unit))
    own = {"margin": examples.margins[list(units)], "pair_weight": examples.pair_weights[list(units)]}
    extra = {name: torch.from_numpy(values) for name, values in own.items()}
    return replace(pack_answers(groups), loss_denominator=float(own["pair_weight"].sum()), extra=extra)


class Group(NamedTuple):
    """A prompt and the answers to it, each with the weights of its tokens, of which one at least is not zero. sequence: the
    number of the one that the prompt is of."""

    prompt: NDArray[np.int32]
    answers: list[tuple[NDArray[np.int32], NDArray[np.float32]]]
    sequence: int


def pack_answers(groups: Sequence[Group]) -> PackedBatch:
    """Each prompt once, then its answers: all of them see it, none sees another.

    The first token of an answer is predicted by the prompt's last. `loss_denominator` is the sum of the weights.
    """
    tokens: list[NDArray] = []
    positions: list[NDArray] = []
    segments: list[Segment] = []
    source: list[NDArray] = []
    target: list[NDArray] = []
    weight: list[NDArray] = []
    owner: list[NDArray] = []
    ends: list[int] = []
    at = 0
    for group in groups:
        prompt = Segment(at, at + len(group.prompt))
        segments.append(prompt)
        tokens.append(group.prompt)
        positions.append(np.arange(len(group.prompt), dtype=np.int64))
        at = prompt.stop
        for ids, weights in group.answers:
            segments.append(Segment(at, at + len(ids), prompt.start, prompt.stop))
            tokens.append(ids)
            positions.append(np.arange(len(group.prompt), len(group.prompt) + len(ids), dtype=np.int64))
            counts = np.flatnonzero(weights)
            source.append(np.where(counts == 0, prompt.stop - 1, at + counts - 1))
            target.append(ids[counts].astype(np.int64))
            weight.append(weights[counts])
            owner.append(np.full(len(counts), len(ends), dtype=np.int64))
            ends.append(at + int(counts[-1]))
            at += len(ids)
    flat = np.concatenate(tokens).astype(np.int64)
    kept = np.concatenate(weight)
    return PackedBatch(
        tokens=torch.from_numpy(flat)[None],
        positions=torch.from_numpy(np.concatenate(positions))[None],
        segments=tuple(segments),
        logit_index=torch.from_numpy(np.concatenate(source)),
        target=torch.from_numpy(np.concatenate(target)),
        weight=torch.from_numpy(kept),
        sequence_id=torch.from_numpy(np.concatenate(owner)),
        eos_index=torch.tensor(ends),
        num_answers=len(ends),
        rows=tuple(group.sequence for group in groups),
        loss_denominator=float(kept.sum()),
    )


def zero_weight(batch: PackedBatch) -> PackedBatch:
    """The same batch counting for nothing: for a process that has run out of units while others have not.

    It goes through the model, for the others wait for that; the loop lets its loss and metrics count for zero.
    """
    return replace(batch, loss_denominator=0.0)


def permutation(size: int, *seeds: int) -> NDArray[np.int64]:
    return np.random.default_rng(seeds).permutation(size)


@dataclass(frozen=True)
class BatchSampler:
    """Which units step `s` of a run draws: all is known beforehand, so resuming needs no state.

    drawn: int64, the units of the whole run in turn; a run ends with a smaller step where the batch does not divide them.
    """

    drawn: NDArray[np.int64]
    batch_size: int
    grad_accum: int
    world_size: int

    @classmethod
    def shuffled(
        cls, num_units: int, batch_size: int, grad_accum: int, world_size: int, seed: int, total_units: int
    ) -> BatchSampler:  # fmt: skip
        """`total_units` draws from `num_units`, every pass a fresh permutation."""
        passes = [permutation(num_units, seed, epoch) for epoch in range(-(-total_units // num_units))]
        return cls(np.concatenate(passes)[:total_units], batch_size, grad_accum, world_size)

    @property
    def units_per_step(self) -> int:
        return self.batch_size * self.grad_accum * self.world_size

    @property
    def num_steps(self) -> int:
        return -(-len(self.drawn) // self.units_per_step)

    def step(self, step: int) -> list[int]:
        """All units of optimizer step `step` (from 0), over all micro-batches and processes."""
        return self.drawn[step * self.units_per_step : (step + 1) * self.units_per_step].tolist()

    def micro(self, step: int, rank: int) -> list[list[int]]:
        """The units of each micro-batch of one process; an empty list where others still have units and it has none."""
        units, size, world = self.step(step), self.batch_size, self.world_size
        used = [m for m in range(self.grad_accum) if m * world * size < len(units)]
        return [units[(m * world + rank) * size : (m * world + rank + 1) * size] for m in used]

    def until(self, steps: int) -> BatchSampler:
        """Its first so many steps."""
        return replace(self, drawn=self.drawn[: steps * self.units_per_step])

    def first_seen(self) -> list[int]:
        """The steps that draw a unit which no step before has drawn."""
        return sorted({int(i) // self.units_per_step for i in np.unique(self.drawn, return_index=True)[1]})
