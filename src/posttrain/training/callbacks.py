"""What has a part in every optimizer step beside the loss: AdaLoRA's budget, EWC's pull."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class StepCallback(Protocol):
    """What is done in every optimizer step, and its state for checkpoints."""

    def penalty(self) -> Tensor: ...  # added to the step's mean loss

    def after_step(self, done: int) -> None: ...  # after step number `done` (from 1), before the gradients are cleared

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


class CompositeCallback:
    """Several callbacks as one. Their states have names of their own."""

    def __init__(self, callbacks: Sequence[StepCallback]) -> None:
        self.callbacks = callbacks

    def penalty(self) -> Tensor:
        return torch.stack([callback.penalty() for callback in self.callbacks]).sum()

    def after_step(self, done: int) -> None:
        for callback in self.callbacks:
            callback.after_step(done)

    def state(self) -> dict[str, Tensor]:
        return {name: value for callback in self.callbacks for name, value in callback.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        for callback in self.callbacks:
            callback.load(state)


def together(callbacks: Sequence[StepCallback]) -> StepCallback | None:
    """All of them as one; None where there is none."""
    return CompositeCallback(callbacks) if len(callbacks) > 1 else next(iter(callbacks), None)
