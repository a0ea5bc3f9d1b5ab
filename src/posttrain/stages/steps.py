"""What a stage brings to a run: four steps, each of which is told all it needs and returns a dataclass. `stage.py` runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import Batch
from posttrain.data.collate import BatchSampler
from posttrain.runs.cache import cached_tensors
from posttrain.runs.cache_place import cache_root, hold, make_directory, place_of
from posttrain.runs.directory import Run
from posttrain.runs.identity import content_hash
from posttrain.training.callbacks import StepCallback
from posttrain.training.objective import LossFunction, UpdateSource
from posttrain.training.processes import Processes
from posttrain.training.state import TrainState
from posttrain.training.tracking import Tracker

D = TypeVar("D")  # the data that a stage prepares
M = TypeVar("M")  # the model that it builds
B = TypeVar("B", bound=Batch)


@dataclass(frozen=True)
class Context:
    """What every step of a run may use.

    Args:
        cfg: the stage's config.
        directory: the run's.
        processes: how many share the run; main: is this the one that reads and writes its directory?
        device: where the model will be.
        check: raises Stopped after a signal; called between pieces of long work.
        weights: False where only a plan is wanted: no weight is fetched or hashed, nothing is made by a model.
    """

    cfg: Any
    directory: Path
    processes: int
    main: bool
    device: torch.device
    check: Callable[[], None]
    weights: bool = True

    def own(self, name: str, *made_from: Any) -> Path:
        """Where a file of the run's directory is for this process: there, or in the cache of a machine that does not see it, and
        makes it again."""
        shared = self.directory / name
        if self.main or shared.exists():
            return shared
        folder = place_of(cache_root() / "runs" / content_hash(*made_from))
        make_directory(folder.parent)
        folder.mkdir(exist_ok=True)
        hold(folder)
        return folder / name


@dataclass(frozen=True)
class Prepared(Generic[D]):
    """1. All that is read before a weight is loaded.

    Args:
        data: the stage's own.
        identity: what makes the run itself beside its config, by the key under which `resume.allow` lets it change.
        order: which units a step draws.
        lines: what is about to happen, in the user's words.
        where: what messages call the row of a batch.
        lr: what `optim.lr=auto` is; None where it is a number.
    """

    data: D
    identity: dict[str, Any]
    order: BatchSampler
    lines: list[str]
    where: Callable[[int], str]
    lr: float | None = None

    @property
    def num_steps(self) -> int:
        """Optimizer steps (of ppo: rollouts) of the whole run."""
        return self.order.num_steps


@dataclass(frozen=True)
class Trainable(Generic[M]):
    """2. The model as it will be trained.

    Args:
        module: what the optimizer sees.
        model: what the run leaves.
        trained, total: counts of parameters.
        as_given: within it the model is what the stage was given, before any training.
    """

    module: nn.Module
    model: M
    trained: int
    total: int
    as_given: Callable[[], AbstractContextManager[None]] = nullcontext


@dataclass(frozen=True)
class Measured:
    """Held-out figures, and a value for each held-out unit of those that have one."""

    metrics: dict[str, float] = field(default_factory=dict[str, float])
    rows: dict[str, list[float]] = field(default_factory=dict[str, list[float]])

    def __or__(self, other: Measured) -> Measured:
        return Measured(self.metrics | other.metrics, self.rows | other.rows)


@dataclass(frozen=True)
class Training(Generic[B]):
    """3. What the loop runs.

    Args:
        updates: what a step of the run trains on.
        loss: of one micro-batch.
        measure: the stage's own held-out figures after so many steps.
        measure_around: figures that are taken before and after the whole run only; told whether it is after.
        compare: figures of both ends together, such as forgetting: before, after -> by name.
        references: what a checkpoint must have been trained against, by key, as `Prepared.identity`.
        callback: what has a part in every optimizer step beside the loss.
        checkpoint_gate: may the weights after so many steps be kept? None: always.
        unit: what the size of a batch counts.
        data: the prepared data where a curriculum has put it in another order; None: as it was.
    """

    updates: UpdateSource[B]
    loss: LossFunction[B]
    measure: Callable[[int, Callable[[], None]], Measured]
    measure_around: Callable[[bool], Measured] = lambda after: Measured()
    compare: Callable[[dict[str, float], dict[str, float]], dict[str, float]] = lambda before, after: {}
    references: dict[str, Any] = field(default_factory=dict[str, Any])
    callback: StepCallback | None = None
    checkpoint_gate: Callable[[int], bool] | None = None
    unit: str = "tokens"
    data: Any = None


@dataclass(frozen=True)
class Outcome:
    """5. What training came to. steps: whose weights these are; measured: after them; metrics: of both ends and together, as
    the manifest has them."""

    state: TrainState
    steps: int
    measured: Measured
    metrics: dict[str, float]


class Steps(Protocol[D, M, B]):
    """What a stage brings to a run. Steps are told all they need and keep nothing to themselves."""

    def prepare(self, context: Context) -> Prepared[D]:
        """Raises UserError for everything that can be refused before a weight is loaded."""
        ...

    def build(self, context: Context, prepared: Prepared[D], accelerator: Accelerator) -> Trainable[M]:
        """Raises UserError for what only the loaded model can refuse, such as targets that match nothing."""
        ...

    def training(self, context: Context, prepared: Prepared[D], built: Trainable[M], session: Session) -> Training[B]:
        """Called with the model as given, before any checkpoint is loaded."""
        ...

    def save(
        self, context: Context, prepared: Prepared[D], built: Trainable[M], outcome: Outcome, accelerator: Accelerator
    ) -> dict[str, Any]:
        """Write the result; what the manifest says of it. Every process must call it."""
        ...


@dataclass(frozen=True)
class Session:
    """What training happens in. module: as it is trained, in accelerate's precision. state: as a checkpoint left it, or new."""

    module: nn.Module
    accelerator: Accelerator
    run: Run
    state: TrainState
    tracker: Tracker

    def cached(self, kind: str, key: str, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
        """What `make` gives, computed once and kept in the cache under a name that says what it depends on. Every process must
        call it."""
        path, writes = cache_root() / kind / f"{key}.safetensors", self.accelerator.is_local_main_process
        return cached_tensors(path, make, writes=writes, agree=self.processes.all_say)

    @property
    def processes(self) -> Processes:
        """Those that share the run."""
        return Processes.of(self.accelerator)
