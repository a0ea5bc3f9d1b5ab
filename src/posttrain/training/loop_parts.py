"""What the training loop is made of, and how it goes back to a checkpoint."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Generic

from accelerate import Accelerator
from torch import nn
from torch.optim import Optimizer

from posttrain.training.best import Judge
from posttrain.training.callbacks import StepCallback
from posttrain.training.checkpoint import Checkpoint, newest_checkpoint, restore
from posttrain.training.guard import GuardConfig
from posttrain.training.metrics import Averages
from posttrain.training.objective import B, LossFunction, UpdateSource
from posttrain.training.optimizer import Schedule, plain_optimizer
from posttrain.training.processes import Processes
from posttrain.training.signals import StopSignal
from posttrain.training.state import TrainState
from posttrain.training.tracking import Tracker


@dataclass(frozen=True)
class LoopConfig:
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
    min_lr: float = 0.0
    decay_steps: int = 0


@dataclass
class LoopParts(Generic[B]):
    """What a loop runs, and its checkpoints. `state` holds what one keeps beside the weights."""

    name: str
    accelerator: Accelerator
    module: nn.Module
    optimizer: Optimizer
    loss: LossFunction[B]
    source: UpdateSource[B]
    config: LoopConfig
    tracker: Tracker
    checkpoints: Path
    stop: StopSignal
    evaluate: Callable[[int], dict[str, float]]  # after so many steps
    stop_after: int | None = None  # steps of this start
    unit: str = "tokens"  # what the size of a batch counts
    callback: StepCallback | None = None
    checkpoint_gate: Callable[[int], bool] | None = None  # may these weights be kept? if not, the run ends with the last kept
    guard: GuardConfig = field(default_factory=GuardConfig)
    judge: Judge | None = None  # of evaluations, where the best of them decides something
    where: Callable[[int], str] = str  # what the number of a row is called
    saving: Callable[[], AbstractContextManager[None]] = nullcontext  # around each save
    state: TrainState = field(default_factory=TrainState)
    window: Averages = field(default_factory=Averages)  # since the last logged step

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimizer and method as they were. Raises UserError when they do not fit."""
        restore(checkpoint, self.module, plain_optimizer(self.optimizer), self.processes)
        if self.callback:
            self.callback.load(self.processes.told(lambda: checkpoint.method))

    def _newest(self) -> Checkpoint:
        """One was saved at the start."""
        checkpoint, _ = self.processes.told(lambda: newest_checkpoint(self.checkpoints))
        assert checkpoint
        return checkpoint

    @property
    def processes(self) -> Processes:
        """Those that share the run."""
        return Processes.of(self.accelerator)
