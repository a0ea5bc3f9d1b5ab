"""Figures as sums and counts, over micro-batches, steps and processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import Metrics
from posttrain.devices.out_of_memory import in_parts
from posttrain.training.objective import B, LossFunction


def total_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    return cast(Tensor, accelerator.reduce(values.to(accelerator.device), "sum"))


class Averages:
    """Sums and counts by name, on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float | Tensor] = {}

    def add(self, metrics: Metrics, share: float = 1.0) -> None:
        """Add the sums and counts of a batch, weighted by `share`."""
        for name, (total, count) in metrics.items():
            part = share * total.detach()
            self.sums[name] = self.sums[name].to(part.device) + part if name in self.sums else part
            self.counts[name] = self.counts.get(name, 0.0) + share * count

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Averages, over all processes when an accelerator is given, of all of which something was counted; everything starts
        anew."""
        names = sorted(self.sums)
        if not names:  # nothing was learnt from
            return {}
        found = [self.sums[n] for n in names] + [torch.as_tensor(self.counts[n]) for n in names]
        # what a stage knows without the model is on the CPU
        device = next((each.device for each in found if each.device.type != "cpu"), found[0].device)
        totals = torch.stack([each.to(device, torch.float32) for each in found])
        if accelerator is not None and accelerator.num_processes > 1:
            totals = total_over(accelerator, totals)
        values = totals.tolist()
        self.sums, self.counts = {}, {}
        return {n: values[i] / values[i + len(names)] for i, n in enumerate(names) if values[i + len(names)]}

    def state(self) -> dict[str, tuple[float, float]]:
        """What has been added since the last reading, for a checkpoint."""
        return {name: (float(value), float(self.counts[name])) for name, value in self.sums.items()}

    def load(self, states: list[dict[str, tuple[float, float]]], rank: int = 0, processes: int = 1) -> None:
        """Go on from what `state` has said, each process from its own. Of another number of processes the first takes up all."""
        if len(states) == processes:
            state = states[rank]
        elif rank:
            state = {}
        else:
            names = dict.fromkeys(name for each in states for name in each)
            found = {name: [each[name] for each in states if name in each] for name in names}
            state = {name: (sum(total for total, _ in some), sum(count for _, count in some)) for name, some in found.items()}
        self.sums = {name: torch.tensor(total) for name, (total, _) in state.items()}
        self.counts = {name: count for name, (_, count) in state.items()}


def evaluate(
    module: nn.Module, batches: list[B], loss: LossFunction[B], device: torch.device, each: Callable[[], None]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Averages of the loss's metrics over `batches`, and its values for each unit, without gradients.

    Every process computes all of them. `each` is called after every batch, and may raise to leave.
    """
    module.eval()
    found, rows = Averages(), dict[str, list[Tensor]]()
    with torch.no_grad():
        for batch in batches:
            for output in in_parts(lambda part: loss(module, part.to(device)), batch, lambda part: part.split(), "evaluation"):
                found.add(output.metrics)
                for name, values in output.rows.items():
                    rows.setdefault(name, []).append(values.cpu())
            each()
    return found.read(), {name: torch.cat(values) for name, values in rows.items()}
