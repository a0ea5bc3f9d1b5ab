"""Log-probs of the answers under the stage's start: computed once, so that epochs and the jobs of a sweep share them.

The reference of a stage is the model it starts from, whatever adapters that carries, so its log-probs are the policy's own
before the first step. They are computed in the very batches that the first epoch will draw: the same numbers come out of the
same kernels, and the first step's margin is exactly zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import PackedBatch
from posttrain.console import Meter
from posttrain.data.collate import BatchSampler, pack_pairs
from posttrain.data.examples import Examples
from posttrain.evaluation.held_out import pack_by_tokens
from posttrain.losses.tokens import answer_sums
from posttrain.runs.identity import content_hash
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.training import References
from posttrain.stages.steps import Context, Session


def references(context: Context, data: PreparedData, session: Session) -> References:
    """Held-out batches with their reference, and the table of training references, both by the model as it was given."""
    order = data.order
    layout = [order.batch_size, order.grad_accum, order.world_size, [order.step(step) for step in order.first_seen()]]
    key = content_hash(data.function(context.cfg), data.data.key, layout, str(context.device))
    make = partial(train_reference, session.module, data.data.train, order, session.accelerator, context.check)
    table = session.cached("reference", key, lambda: {"reference": make()})["reference"]
    held_out = [
        attach(batch, reference_logps(session.module, batch, context.device))
        for batch in pack_by_tokens(pack_pairs, data.data.held_out)
    ]

    def compared(batch: PackedBatch, units: list[int]) -> PackedBatch:
        return attach(batch, table[units].reshape(-1))

    return References(held_out, compared, {"dpo.reference": digest_of(table)})


def attach(batch: PackedBatch, reference: Tensor) -> PackedBatch:
    """reference: float32 [num_answers], chosen and rejected in turn."""
    return replace(batch, extra={**batch.extra, "reference": reference})


def digest_of(table: Tensor) -> str:
    """A hash of the table, which checkpoints keep."""
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()[:32]


def reference_logps(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """float32 [num_answers] on the CPU, without dropout."""
    module.eval()
    with torch.no_grad():
        moved = batch.to(device)
        return answer_sums(module(moved), moved.sequence_id, moved.num_answers).float().cpu()


def train_reference(
    module: nn.Module, examples: Examples, order: BatchSampler, accelerator: Accelerator, check: Callable[[], None]
) -> Tensor:
    """float32 [units, 2]: chosen and rejected log-probs of every unit that the run will draw; NaN for the others. Every process
    must call it."""
    table = torch.full((len(examples), 2), float("nan"))
    steps = order.first_seen()
    with Meter("reference", len(steps)) as meter:
        for step in steps:
            for units in order.micro(step, accelerator.process_index):
                # with nothing of its own a process still takes part: under FSDP the others wait for it
                found = reference_logps(module, pack_pairs(examples, units or [0]), accelerator.device).view(-1, 2)[: len(units)]
                new = torch.tensor([bool(table[unit].isnan().any()) for unit in units], dtype=torch.bool)
                table[torch.tensor(units, dtype=torch.int64)[new]] = found[new]
            meter.advance()
            check()
    return _union(table, accelerator) if accelerator.num_processes > 1 else table


def _union(table: Tensor, accelerator: Accelerator) -> Tensor:
    """Every process has filled its own units; a unit that two have filled (an epoch's seam) takes the mean."""
    known = ~table.isnan()
    both = torch.stack([table.nan_to_num(), known.float()]).to(accelerator.device)
    total, times = accelerator.reduce(both, "sum").cpu()  # type: ignore[union-attr]
    return torch.where(times > 0, total / times.clamp(min=1), torch.nan)
