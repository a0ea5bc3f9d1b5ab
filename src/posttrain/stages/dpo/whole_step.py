"""What a loss must know of all answers of a step before it is asked about any of them (`OverStep`).

It is computed by the weights before the step, without dropout or gradient, over all micro-batches and processes. So the KL of KTO
and the ranks of AOT are those of the step, however it is cut.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from posttrain.batch import PackedBatch
from posttrain.losses.answers import Answers
from posttrain.losses.pairs import Pairs
from posttrain.models.language.objectives import answer_lengths
from posttrain.training.processes import Processes


def compared(batch: PackedBatch, policy: Tensor, unpaired: bool) -> Pairs | Answers:
    """What a loss is asked about: the log-probs of a batch's answers beside its reference."""
    reference, lengths, step = batch.extra.get("reference"), answer_lengths(batch), batch.extra.get("step")
    if not unpaired:
        return Pairs(policy, reference, lengths, step)
    assert reference is not None, "losses on labelled answers need a reference"
    return Answers(policy, reference, lengths, batch.extra["margin"] > 0, step)


def over_step(
    values: Callable[[Any], Tensor],
    logps: Callable[[PackedBatch], Tensor],
    batches: Sequence[PackedBatch],
    seen: Sequence[PackedBatch],
    unpaired: bool,
    processes: Processes,
) -> list[PackedBatch]:
    """`batches` of a step, each with its part of the step's values as `step`.

    Args:
        values: see `OverStep`.
        logps: the policy's, of a batch's answers.
        seen: the batches whose log-probs decide, of the same units. Every one goes through the model, for other processes wait;
            those that are silent count for nothing.
        processes: those that share the step.
    """
    each = [compared(batch, logps(batch), unpaired) for batch in seen]
    mine = [vars(found) for found, batch in zip(each, batches, strict=True) if batch.loss_denominator]
    by_rank = processes.gathered(mine)
    everyones = [found for of_rank in by_rank for found in of_rank]
    if not everyones:
        return list(batches)
    joined = {name: torch.cat([found[name] for found in everyones]) for name in everyones[0] if name != "step"}
    of_all = values((Answers if unpaired else Pairs)(**joined))
    earlier = sum(len(found["policy"]) for of_rank in by_rank[: processes.rank] for found in of_rank) // (1 if unpaired else 2)
    return _dealt(of_all[earlier:], batches)


def _dealt(values: Tensor, batches: Sequence[PackedBatch]) -> list[PackedBatch]:
    """The first values to the first batch, and so on; zeros to those that are silent."""
    found: list[PackedBatch] = []
    start = 0
    for batch in batches:
        count = len(batch.rows)
        part = values[start : start + count].clone() if batch.loss_denominator else torch.zeros(count, *values.shape[1:])
        start += count if batch.loss_denominator else 0
        found.append(replace(batch, extra={**batch.extra, "step": part}))
    return found
