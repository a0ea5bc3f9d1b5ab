"""What has a part in every optimizer step beside the loss: AdaLoRA's budget, EWC's pull."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor


class StepCallback(Protocol):
    """What is done in every optimizer step, and its state for checkpoints."""

    def penalty(self) -> Tensor:
        """Added to the step's mean loss."""
        ...

    def after_step(self, done: int) -> None:
        """Called after step number `done` (from 1), before the gradients are cleared."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Take up what a checkpoint has kept."""
        ...


class CompositeCallback:
    """Several callbacks as one. Their states have names of their own."""

    def __init__(self, callbacks: Sequence[StepCallback]) -> None:
        self.callbacks = callbacks

    def penalty(self) -> Tensor:
        """The sum of all penalties."""
        return torch.stack([callback.penalty() for callback in self.callbacks]).sum()

    def after_step(self, done: int) -> None:
        """Every callback's part after a step."""
        for callback in self.callbacks:
            callback.after_step(done)

    def state(self) -> dict[str, Tensor]:
        """The states of all callbacks together."""
        return {name: value for callback in self.callbacks for name, value in callback.state().items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Give every callback the states of all; each takes its own."""
        for callback in self.callbacks:
            callback.load(state)


def together(callbacks: Sequence[StepCallback]) -> StepCallback | None:
    """All of them as one; None where there is none."""
    return CompositeCallback(callbacks) if len(callbacks) > 1 else next(iter(callbacks), None)
