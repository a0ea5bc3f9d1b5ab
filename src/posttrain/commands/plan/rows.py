"""What a run would draw: its steps and tokens, by the stage's own first step where the rows are at hand."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.data.selection import replays, sources_of
from posttrain.data.sources.source import is_local
from posttrain.devices.device import Device
from posttrain.errors import UserError
from posttrain.stages.language.init import InitSource, find_base, resolve_start
from posttrain.stages.spec import StageSpec
from posttrain.stages.steps import Context


@dataclass(frozen=True)
class Rows:
    """Steps and tokens: exact where the rows are at hand, else at most."""

    start: InitSource
    base: str
    longest: int
    largest_batch: int
    units: int
    steps: int
    tokens: float
    tokens_are: str


def rows_of(cfg: Any, spec: StageSpec, device: Device) -> Rows:
    """By the stage's own first step, where the rows are at hand."""
    train = cfg.train
    if replays(cfg.data) or not all(is_local(source.path) for source in sources_of(cfg.data).values()):
        if not train.max_steps:
            raise UserError(
                f"train.max_steps: the rows of {cfg.data.path} are not at hand, so give the number of steps to plan for"
            )
        units, start = train.max_steps * train.batch_size * train.grad_accum * train.processes, resolve_start(cfg, weights=False)
        base = find_base(start, cfg.model.revision, weights=False)
        length, batch = train.max_length, train.batch_size * train.max_length
        return Rows(start, base.path, length, batch, units, train.max_steps, units * length, "at most")
    context = Context(cfg, Path(), train.processes, True, torch.device(device.kind), lambda: None, weights=False)
    found = spec.steps_of(cfg).prepare(context).data
    examples, order = found.data.train, found.order
    lengths = spec.plan_of().unit_tokens(cfg, examples)
    largest = int(sum(sorted(lengths.tolist())[-train.batch_size :]))
    counted = min(order.num_steps, 2000)
    tokens = sum(int(lengths[unit]) for step in range(counted) for unit in order.step(step)) * order.num_steps / counted
    exact = "exact" if order.num_steps <= 2000 else "about"
    return Rows(found.start, found.base.path, int(lengths.max()), largest, len(examples), order.num_steps, tokens, exact)
