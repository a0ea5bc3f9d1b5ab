"""What a loop is made of: updates, when things happen, what a method adds to a step, and averages."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import Batch, LossOutput, Metrics
from posttrain.training.optimizer import Schedule

B = TypeVar("B", bound=Batch)
Objective = Callable[[nn.Module, B], LossOutput]


@dataclass(frozen=True)
class Update(Generic[B]):
    """One step of the optimizer: this process's micro-batches (none: no step), and figures as in `LossOutput`."""

    batches: list[B]
    metrics: Metrics = field(default_factory=dict)


Source = Callable[
    [int], Iterable[Update[B]]
]  # step of the run (from 0) -> its updates: one, or in PPO as many as a rollout feeds


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps of the run."""

    num_steps: int
    warmup_steps: int
    log_steps: int
    eval_steps: int | None
    save_steps: int | None
    keep_checkpoints: int
    lr: float
    schedule: Schedule
    max_grad_norm: float | None
    seed: int


class StepCallback(Protocol):
    """What a method has to do in every optimizer step, and its state for checkpoints."""

    def penalty(self) -> Tensor: ...  # added to the step's mean loss

    def after_step(self, done: int) -> None: ...  # after step number `done` (from 1), before the gradients are cleared

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


def total_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    return cast(Tensor, accelerator.reduce(values.to(accelerator.device), "sum"))


def everywhere(accelerator: Accelerator, mine: bool) -> bool:
    """Whether all processes say yes; each must ask."""
    if accelerator.num_processes == 1:
        return mine
    return int(total_over(accelerator, torch.tensor(float(mine))).item()) == accelerator.num_processes


class Averages:
    """Sums and counts by name, on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float | Tensor] = {}

    def add(self, metrics: Metrics, share: float = 1.0) -> None:
        for name, (total, count) in metrics.items():
            part = share * total.detach()
            self.sums[name] = self.sums[name].to(part.device) + part if name in self.sums else part
            self.counts[name] = self.counts.get(name, 0.0) + share * count

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Averages, over all processes when an accelerator is given; everything starts anew."""
        names = sorted(self.sums)
        if not names:  # nothing was learnt from
            return {}
        device = self.sums[names[0]].device
        totals = torch.stack(
            [self.sums[n].float() for n in names] + [torch.as_tensor(self.counts[n], device=device) for n in names]
        )
        if accelerator is not None and accelerator.num_processes > 1:
            totals = total_over(accelerator, totals)
        values = totals.tolist()
        self.sums, self.counts = {}, {}
        return {n: values[i] / max(values[i + len(names)], 1e-12) for i, n in enumerate(names)}

    def state(self) -> dict[str, tuple[float, float]]:
        """What has been added since the last reading, for a checkpoint."""
        return {name: (float(value), float(self.counts[name])) for name, value in self.sums.items()}

    def load(self, state: dict[str, tuple[float, float]]) -> None:
        self.sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}
