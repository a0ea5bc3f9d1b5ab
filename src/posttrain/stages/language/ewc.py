"""What holds a stage to its start: EWC's Fisher of general text, or L2, as a part of every optimizer step."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from posttrain.console import Meter
from posttrain.data.collate import pack
from posttrain.data.examples import Examples
from posttrain.losses.ewc import ewc_penalty, fisher_diagonal
from posttrain.training.checkpoint import trainable
from posttrain.training.loss_scale import gradients_by


class EwcPenalty:
    """The penalty on what is trained, for where it stood when this was made. There is nothing to save: the start is made anew."""

    def __init__(self, module: nn.Module, importance: dict[str, Tensor] | None, strength: float) -> None:
        """importance: by parameter; None: all alike (L2)."""
        named = trainable(module)
        self.params = list(named.values())
        self.start = [p.detach().clone() for p in self.params]
        self.importance = [
            torch.ones((), device=p.device) if importance is None else importance[name].to(p.device) for name, p in named.items()
        ]
        self.strength = strength

    def penalty(self) -> Tensor:
        """The pull to the start, a scalar."""
        return ewc_penalty(self.params, self.start, self.importance, self.strength)

    def after_step(self, done: int) -> None:
        """Nothing: the start and its Fisher do not change."""

    def state(self) -> dict[str, Tensor]:
        """Nothing: both are computed again, or read from the cache."""
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        """Nothing, as `state`."""


def fisher(
    module: nn.Module, examples: Examples, device: torch.device, check: Callable[[], None], in_float16: bool = False
) -> dict[str, Tensor]:
    """Diagonal Fisher of what is trained, on every sequence of `examples`: parameter's name -> its shape. in_float16: gradients
    go through it, and are scaled on their way as those of a step."""
    named, count = trainable(module), len(examples.rows)
    gradients = gradients_by("float16" if in_float16 else "float32")
    module.eval()

    def log_likelihoods() -> Iterator[Tensor]:
        with Meter("fisher", count) as meter:
            for unit in range(len(examples)):
                for i in examples.sequences(unit):
                    batch = pack(examples.only(i), [0]).to(device)
                    yield (module(batch) * batch.weight).sum()
                    meter.advance()
                    check()

    return dict(zip(named, fisher_diagonal(log_likelihoods(), list(named.values()), gradients), strict=True))
