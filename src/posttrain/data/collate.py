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


class _Laid(NamedTuple):
    """A sequence in a pack: tokens from `shared` on begin at `start`, those before them at `head`, which is another's start."""

    sequence: int
    start: int
    shared: int = 0
    head: int = 0


def _laid(examples: Examples, units: Sequence[int]) -> list[_Laid]:
    """The sequences of units in turn; those that share their beginning with their unit's last one behind that."""
    found, start = list[_Laid](), 0
    for unit in units:
        among = examples.sequences(unit)
        shared = examples.shared[among.start : among.stop].tolist() or [0] * len(among)
        head = start
        for i, common in sorted(zip(among, shared, strict=True), key=lambda each: each[1] > 0):
            head = start if not common else head
            found.append(_Laid(i, start, common, head if common else 0))
            start += int(examples.offsets[i + 1] - examples.offsets[i]) - common
    return found


def pack(examples: Examples, units: Sequence[int]) -> PackedBatch:
    """Documents or conversations end to end; attention and positions never cross from one to the next, but for what those of one
    row begin with in common, which is laid once.

    `loss_denominator` is the sum of the weights.
    """
    laid = _laid(examples, units)
    pieces = [tuple(part[each.shared :] for part in examples.sequence(each.sequence)) for each in laid]
    lengths = [len(tokens) for tokens, _ in pieces]
    starts = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    weights = np.concatenate([w for _, w in pieces])
    weights[[each.start for each in laid if not each.shared]] = 0.0  # nothing predicts a first token
    target_at = np.flatnonzero(weights)
    tokens = np.concatenate([t for t, _ in pieces]).astype(np.int64)
    positions = np.concatenate([np.arange(n, dtype=np.int64) + each.shared for n, each in zip(lengths, laid, strict=True)])
    owner = np.repeat(np.arange(len(pieces), dtype=np.int64), lengths)[target_at]
    kept = weights[target_at]
    ends = starts[1:] - 1
    ends[owner] = target_at  # of several in one answer the last one stays
    sources = np.arange(-1, len(tokens) - 1)
    for each in laid:
        sources[each.start] = each.head + each.shared - 1  # what is shared predicts what comes after it
    spans = [(a, b, each.head, each.head + each.shared) for (a, b), each in zip(pairwise(starts.tolist()), laid, strict=True)]
    return PackedBatch(
        tokens=torch.from_numpy(tokens)[None],
        positions=torch.from_numpy(positions)[None],
        segments=tuple(Segment(*span) for span in spans),
        logit_index=torch.from_numpy(sources[target_at]),
        target=torch.from_numpy(tokens[target_at]),
        weight=torch.from_numpy(kept),
        sequence_id=torch.from_numpy(owner),
        eos_index=torch.from_numpy(ends),
        num_answers=len(pieces),
        rows=tuple(each.sequence for each in laid if not each.shared),
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
    return _labelled(groups, examples, units)


def pack_labelled(examples: Examples, units: Sequence[int]) -> PackedBatch:
    """Each labelled answer behind its prompt; `margin` is the label, 1 or -1. `loss_denominator` is the sum of their weights."""
    return _labelled([_answer(examples, unit, unit) for unit in units], examples, units)


def pack_mismatched(examples: Examples, units: Sequence[int]) -> PackedBatch:
    """Each prompt with the answer of the next unit that has another prompt, cut where it would be longer than any unit is. Raises
    LookupError where all have the same."""
    longest = int(examples.unit_tokens().max())
    groups = []
    for unit in units:
        group = _answer(examples, unit, other_prompt(examples, unit))
        (tokens, weights), room = group.answers[0], longest - len(group.prompt)
        groups.append(group._replace(answers=[(tokens[:room], weights[:room])]))
    return _labelled(groups, examples, units)


def other_prompt(examples: Examples, unit: int) -> int:
    """The next unit, after the last one from the first on, whose prompt is not that of `unit`. Raises LookupError."""
    prompt, count = _prompt(examples, unit), len(examples)
    for step in range(1, count):
        if not np.array_equal(prompt, _prompt(examples, (unit + step) % count)):
            return (unit + step) % count
    raise LookupError("all units have the same prompt")


def _prompt(examples: Examples, unit: int) -> NDArray[np.int32]:
    return examples.sequence(unit)[0][: int(examples.splits[unit, 0])]


def _answer(examples: Examples, unit: int, other: int) -> Group:
    """The prompt of one unit with the answer of another."""
    tokens, weights = examples.sequence(other)
    start = int(examples.splits[other, 0])
    return Group(_prompt(examples, unit), [(tokens[start:], weights[start:])], unit)


def _labelled(groups: Sequence[Group], examples: Examples, units: Sequence[int]) -> PackedBatch:
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
    packed = _PackedAnswers()
    for group in groups:
        packed.add(group)
    return packed.batch()


class _PackedAnswers:
    """A batch on the way, of which each list is a field."""

    def __init__(self) -> None:
        self.tokens: list[NDArray] = []
        self.positions: list[NDArray] = []
        self.segments: list[Segment] = []
        self.logit_index: list[NDArray] = []
        self.target: list[NDArray] = []
        self.weight: list[NDArray] = []
        self.sequence_id: list[NDArray] = []
        self.eos_index: list[int] = []
        self.rows: list[int] = []

    def add(self, group: Group) -> None:
        start = self.segments[-1].stop if self.segments else 0
        prompt = Segment(start, start + len(group.prompt))
        self._lay(group.prompt, prompt, first_position=0)
        self.rows.append(group.sequence)
        for ids, weights in group.answers:
            at = self.segments[-1].stop
            self._lay(ids, Segment(at, at + len(ids), prompt.start, prompt.stop), first_position=len(group.prompt))
            counts = np.flatnonzero(weights)
            self.logit_index.append(np.where(counts == 0, prompt.stop - 1, at + counts - 1))
            self.target.append(ids[counts].astype(np.int64))
            self.weight.append(weights[counts])
            self.sequence_id.append(np.full(len(counts), len(self.eos_index), dtype=np.int64))
            self.eos_index.append(at + int(counts[-1]))

    def _lay(self, ids: NDArray[np.int32], segment: Segment, first_position: int) -> None:
        self.tokens.append(ids)
        self.positions.append(np.arange(first_position, first_position + len(ids), dtype=np.int64))
        self.segments.append(segment)

    def batch(self) -> PackedBatch:
        weight = np.concatenate(self.weight)
        return PackedBatch(
            tokens=torch.from_numpy(np.concatenate(self.tokens).astype(np.int64))[None],
            positions=torch.from_numpy(np.concatenate(self.positions))[None],
            segments=tuple(self.segments),
            logit_index=torch.from_numpy(np.concatenate(self.logit_index)),
            target=torch.from_numpy(np.concatenate(self.target)),
            weight=torch.from_numpy(weight),
            sequence_id=torch.from_numpy(np.concatenate(self.sequence_id)),
            eos_index=torch.tensor(self.eos_index),
            num_answers=len(self.eos_index),
            rows=tuple(self.rows),
            loss_denominator=float(weight.sum()),
        )


def zero_weight(batch: PackedBatch) -> PackedBatch:
    """The same batch counting for nothing: for a process that has run out of units while others have not.

    It goes through the model, for the others wait for that; the loop lets its loss and metrics count for zero.
    """
    return replace(batch, loss_denominator=0.0)


def permutation(size: int, *seeds: int) -> NDArray[np.int64]:
    """int64 [size]: a random order that follows from the seeds alone."""
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
        """Units that all processes draw together in one step."""
        return self.batch_size * self.grad_accum * self.world_size

    @property
    def num_steps(self) -> int:
        """Steps of the whole run; the last one may be smaller."""
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
