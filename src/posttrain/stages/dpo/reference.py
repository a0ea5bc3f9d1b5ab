"""Log-probs of the answers under the stage's start: computed once, so that epochs and the jobs of a sweep share them.

The reference of a stage is the model it starts from, whatever adapters that carries, so its log-probs are the policy's own
before the first step. They are computed in the very batches that the first epoch will draw: the same numbers come out of the
same kernels, and the first step's margin is exactly zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import PackedBatch
from posttrain.console import Meter
from posttrain.data.collate import BatchSampler, pack_mismatched, pack_pairs
from posttrain.data.examples import Examples
from posttrain.devices.out_of_memory import in_parts
from posttrain.evaluation.held_out import EVAL_TOKENS, by_tokens
from posttrain.losses.preference import ChosenLoss
from posttrain.losses.tokens import answer_sums
from posttrain.runs.identity import content_hash
from posttrain.stages.dpo.whole_step import over_step
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.training import References
from posttrain.stages.steps import Context, Session
from posttrain.training.processes import Processes

Pack = Callable[[Examples, Sequence[int]], PackedBatch]


def references(loss: ChosenLoss, pack: Pack, context: Context, data: PreparedData, session: Session) -> References:
    """Held-out batches with their reference, and the table of training references, all by the model as it was given; and what
    the loss must know of a whole step."""
    whole = loss.over_step
    packs: dict[str, Pack] = {"reference": pack} | ({"mismatched": pack_mismatched} if whole and whole.mismatched else {})
    tables = {name: _table(each, loss.unpaired, context, data, session) for name, each in packs.items()}
    cut = list(by_tokens(data.data.held_out, EVAL_TOKENS))
    held_out = {
        name: [_asked(each, data.data.held_out, units, context, session) for units in cut] for name, each in packs.items()
    }
    seen = "mismatched" if "mismatched" in packs else "reference"

    def drawn(name: str, units: list[int]) -> PackedBatch:
        return attach(packs[name](data.data.train, units), tables[name][units].reshape(-1))

    def compared(batch: PackedBatch, units: list[int]) -> PackedBatch:
        return attach(batch, tables["reference"][units].reshape(-1))

    def before(batches: list[PackedBatch], others: list[PackedBatch], processes: Processes) -> list[PackedBatch]:
        if not whole:
            return batches
        logps = partial(reference_logps, session.module, device=context.device)
        return over_step(whole.values, logps, batches, others, loss.unpaired, processes)

    def before_step(batches: list[PackedBatch], units: list[list[int]]) -> list[PackedBatch]:
        return before(batches, [drawn(seen, each) for each in units] if whole else [], session.processes)

    return References(
        held_out["reference"],
        compared,
        {f"dpo.{name}": digest_of(table) for name, table in tables.items()},
        before_step=before_step,
        before_measuring=lambda batches: before(batches, held_out[seen], Processes()),
    )


def _table(pack: Pack, unpaired: bool, context: Context, data: PreparedData, session: Session) -> Tensor:
    """float32 [units, answers of a unit], from the cache where it is there."""
    order = data.order
    layout = [order.batch_size, order.grad_accum, order.world_size, [order.step(step) for step in order.first_seen()]]
    key = content_hash(data.function(context.cfg), data.data.key, layout, str(context.device), getattr(pack, "__name__", ""))
    columns = 1 if unpaired else 2
    make = partial(train_reference, session.module, data.data.train, order, session.accelerator, context.check, pack, columns)
    return session.cached("reference", key, lambda: {"reference": make()})["reference"]


def _asked(pack: Pack, examples: Examples, units: list[int], context: Context, session: Session) -> PackedBatch:
    """Units as a batch with its reference."""
    batch = pack(examples, units)
    return attach(batch, reference_logps(session.module, batch, context.device))


def attach(batch: PackedBatch, reference: Tensor) -> PackedBatch:
    """reference: float32 [num_answers], in pairs chosen and rejected in turn."""
    return replace(batch, extra={**batch.extra, "reference": reference})


def digest_of(table: Tensor) -> str:
    """A hash of the table, which checkpoints keep."""
    return hashlib.sha256(table.numpy().tobytes()).hexdigest()[:32]


def reference_logps(module: nn.Module, batch: PackedBatch, device: torch.device) -> Tensor:
    """float32 [num_answers] on the CPU, without dropout."""
    module.eval()

    def read(part: PackedBatch) -> Tensor:
        moved = part.to(device)
        return answer_sums(module(moved), moved.sequence_id, moved.num_answers).float().cpu()

    with torch.no_grad():
        return torch.cat(in_parts(read, batch, PackedBatch.split, "the reference"))


def train_reference(
    module: nn.Module, examples: Examples, order: BatchSampler, accelerator: Accelerator, check: Callable[[], None],
    pack: Pack = pack_pairs, columns: int = 2,
) -> Tensor:  # fmt: skip
    """float32 [units, columns]: the log-probs of the answers of every unit that the run will draw, of a pair chosen and rejected;
    NaN for the others. Every process must call it."""
    table = torch.full((len(examples), columns), float("nan"))
    steps = order.first_seen()
    with Meter("reference", len(steps)) as meter:
        for step in steps:
            for units in order.micro(step, accelerator.process_index):
                # with nothing of its own a process still takes part: under FSDP the others wait for it
                found = reference_logps(module, pack(examples, units or [0]), accelerator.device)
                found = found.view(-1, columns)[: len(units)]
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
