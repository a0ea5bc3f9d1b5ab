"""What all stages share: everything between a config and a finished run, but for what is read, built and asked of a model."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from posttrain.batch import Batch, LossOutput
from posttrain.config.schema import Stage
from posttrain.console import say
from posttrain.data.collate import BatchSampler
from posttrain.errors import UserError
from posttrain.models.peft.attach import lr_ratio
from posttrain.reports.run_page import run_page
from posttrain.runs.directory import Run, allowed, code_state, compare, identity_of, library_versions, read_manifest
from posttrain.stages.manifest import show_outcome
from posttrain.training.checkpoint import Checkpoint, check_room, newest_checkpoint
from posttrain.training.guard import GuardConfig
from posttrain.training.loop import Loop
from posttrain.training.objective import Plan, StepCallback, Update
from posttrain.training.optimizer import make_optimizer
from posttrain.training.signals import StopSignal
from posttrain.training.tracking import Tracker


class ReadInputs(Protocol):
    """All that is read before a weight is loaded. key: names the data; order: which of it a step draws."""

    @property
    def order(self) -> BatchSampler: ...

    @property
    def key(self) -> str: ...


class BuiltModel(Protocol):
    """The model as it will be trained. trained, total: counts of parameters."""

    @property
    def trained(self) -> int: ...

    @property
    def total(self) -> int: ...

    @property
    def schedule(self) -> StepCallback | None: ...


In = TypeVar("In", bound=ReadInputs)
B = TypeVar("B", bound=Batch)


def run_stage(cfg: Stage, run: Run, kind: Callable[[Accelerator, StopSignal], StageRun[Any, Any]]) -> dict[str, Any]:
    """Train to the end, or go on where a checkpoint left off; returns the manifest.

    All that can be refused is refused before a weight is loaded. Raises UserError, RunError or Stopped.
    """
    stop = StopSignal()
    try:
        return kind(_accelerator(cfg, run), stop).go()
    finally:
        stop.restore()


@dataclass
class StageRun(Generic[In, B]):
    """One run of one stage: the steps of `go`, and what they share."""

    cfg: Stage
    run: Run
    accelerator: Accelerator
    stop: StopSignal
    unit = "tokens"  # what the size of a batch counts

    def __post_init__(self) -> None:
        self.loop: Loop[B] | None = None
        self.checkpoint: Checkpoint | None = None  # what the run goes on from
        self.state: dict[str, Any] = {}  # what a checkpoint keeps beside the weights

    def go(self) -> dict[str, Any]:
        with self.stop.at_once(self.accelerator.num_processes == 1):
            loop, start, built, inputs, held_out = self._prepare()
        loop.fit(start)
        with self.stop.at_once(self.accelerator.num_processes == 1):
            done = loop.state.get("ended", {}).get("step", inputs.order.num_steps)
            after = self._measure(loop.module, inputs, held_out, done, trained=True)
            loop.tracker.log(done, after)
        return self._finish(built, inputs, loop.state, after)

    def _prepare(self) -> tuple[Loop[B], int, Any, In, list[B]]:
        """Everything before the first step, of which nothing is lost by leaving."""
        with self.accelerator.main_process_first():  # the others find data and models in the cache
            inputs = self.read()
        self.check(inputs)
        checkpoint = self._newest(inputs)
        self.announce(inputs)
        tracker = Tracker(self.run.metrics, self.accelerator, self.cfg.tracker, self.run.config)
        whole, built = self.build(inputs)
        say(f"training {built.trained:,} of {built.total:,} parameters ({built.trained / built.total:.2%})")
        optim = self.cfg.optim
        optimizer, note = make_optimizer(
            optim.name,
            whole,
            partial(lr_ratio, self.cfg.peft),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        if note:
            say(note)
        check_room(self.run.checkpoints, whole, optim.name)
        module, optimizer = self.accelerator.prepare(whole, optimizer)
        with self.as_given(built, inputs):
            inputs = self.apply_curriculum(module, inputs)
            held_out, table = self.references(module, inputs)
        self.loop = loop = self._loop(module, optimizer, inputs, held_out, table, tracker)
        with self.as_given(built, inputs):
            loop.method, loop.checkpoint_gate = self.step_method(module, built, inputs), self.checkpoint_gate(module, inputs)
            start = self._begin(loop, checkpoint, module, inputs, held_out)
        return loop, start, built, inputs, held_out

    def read(self) -> In:
        """Base and data: everything a mistake of the user can be in. Raises UserError."""
        raise NotImplementedError

    def check(self, inputs: In) -> None:
        """Refuse, before a weight is loaded, what this stage cannot do. Raises UserError."""

    def identity(self, inputs: In) -> dict[str, Any]:
        """What makes the run itself beside its config, by the key under which `resume.allow` lets it change."""
        return {"data.content": inputs.key, "train.processes": self.accelerator.num_processes}

    def announce(self, inputs: In) -> None:
        """Say what is about to happen, in the user's words."""

    def build(self, inputs: In) -> tuple[nn.Module, Any]:
        """The module that is trained, and the model that the run leaves (a `BuiltModel`)."""
        raise NotImplementedError

    def as_given(self, built: Any, inputs: In) -> AbstractContextManager[None]:
        """Within it the model is what the stage was given, before any training."""
        return nullcontext()

    def apply_curriculum(self, module: nn.Module, inputs: In) -> In:
        """The inputs with what only the model can say of them."""
        return inputs

    def step_method(self, module: nn.Module, built: Any, inputs: In) -> StepCallback | None:
        """What has a part in every optimizer step beside the loss."""
        return built.schedule

    def checkpoint_gate(self, module: nn.Module, inputs: In) -> Callable[[int], bool] | None:
        """Whether the weights after so many steps may be kept; None: always."""
        return None

    def references(self, module: nn.Module, inputs: In) -> tuple[list[B], Any]:
        """What is measured on, and what training compares with; both before any checkpoint is loaded."""
        return [], None

    def updates(self, step: int, module: nn.Module, inputs: In, table: Any) -> Iterator[Update[B]]:
        """What step `step` of the run trains on. table: from `references`."""
        raise NotImplementedError

    def objective(self, module: nn.Module, batch: B) -> LossOutput:
        """The loss of one micro-batch."""
        raise NotImplementedError

    def where(self, inputs: In, row: int) -> str:
        """What messages call the row of a batch."""
        raise NotImplementedError

    def measure(self, module: nn.Module, inputs: In, held_out: list[B], done: int, check: Callable[[], None]) -> dict[str, float]:
        """The stage's own held-out figures after `done` steps."""
        return {}

    def measure_more(self, module: nn.Module, inputs: In, trained: bool) -> dict[str, float]:
        """Figures that are taken before and after the whole run only."""
        return {}

    def remarks(self) -> dict[str, Any]:
        """What the manifest says of this stage alone."""
        return {}

    def save(self, built: Any, inputs: In, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        """Write the result; what the manifest says of it. Every process must call it."""
        raise NotImplementedError

    def _loop(self, module: nn.Module, optimizer: Any, inputs: In, held_out: list[B], table: Any, tracker: Tracker) -> Loop[B]:
        cfg, order = self.cfg, inputs.order
        plan = Plan(
            num_steps=order.num_steps,
            warmup_steps=math.ceil(cfg.optim.warmup_ratio * order.num_steps),
            log_steps=cfg.train.log_steps,
            eval_steps=cfg.train.eval_steps,
            save_steps=cfg.train.save_steps,
            keep_checkpoints=cfg.train.keep_checkpoints,
            lr=cfg.optim.lr,
            schedule=cfg.optim.schedule,
            max_grad_norm=cfg.optim.max_grad_norm,
            seed=cfg.train.seed,
        )
        return Loop(
            name=cfg.stage,  # type: ignore[attr-defined]
            accelerator=self.accelerator,
            module=module,
            optimizer=optimizer,
            objective=self.objective,
            source=lambda step: self.updates(step, module, inputs, table),
            plan=plan,
            tracker=tracker,
            checkpoints=self.run.checkpoints,
            stop=self.stop,
            stop_after=cfg.run.stop_after,
            guard=GuardConfig(cfg.train.skip_nonfinite, cfg.train.spike_mads, cfg.train.spike_steps),
            unit=self.unit,
            where=partial(self.where, inputs),
            evaluate=lambda done: self.measure(module, inputs, held_out, done, lambda: None),
        )

    def _newest(self, inputs: In) -> Checkpoint | None:
        """The checkpoint to go on from, verified, before a weight of the base is loaded. Raises UserError where none is whole, or
        it is of another run than this one and `resume.allow` does not name the difference."""
        checkpoint, damaged = newest_checkpoint(self.run.checkpoints)
        for line in damaged:
            say(f"{line}; going on from the newest good one")
        self.checkpoint = checkpoint
        self.state = checkpoint.state if checkpoint else {"changes": []}
        self.keep("identity", identity_of(self.run.config) | self.identity(inputs))
        then, now = self.state.get("made_with", {}), self._made_with()
        differs = [name for name, value in now.items() if then.get(name) != value] if checkpoint else []
        self._changed([f"{name} was {then.get(name)}, is now {now[name]}: the rest may not be bit-identical" for name in differs])
        self.state["made_with"] = now
        if checkpoint is None and self.cfg.run.reproduces:
            self._say_what_differs(Path(self.cfg.run.reproduces))
        return checkpoint

    def keep(self, name: str, now: dict[str, Any]) -> None:
        """Have checkpoints hold, as `name`, what makes the run itself. Raises UserError where the one that it goes on from holds
        another, and neither `resume.allow` names the difference nor a difference that was named before explains it."""
        if self.checkpoint and name in self.state:
            follows = any(change["step"] == self.checkpoint.step for change in self.state["changes"])
            whose = f"{self.checkpoint.path} is of another run"
            self._changed(compare(self.state[name], now, list(now) if follows else allowed(self.run.config), whose))
        self.state[name] = now

    def _changed(self, lines: list[str]) -> None:
        for line in lines:
            assert self.checkpoint
            say(f"from step {self.checkpoint.step} {line}")
            self.state["changes"].append({"step": self.checkpoint.step, "change": line})

    def _say_what_differs(self, other: Path) -> None:
        """From a finished run that this one rebuilds."""
        manifest = read_manifest(other)
        then = manifest["identity"] | manifest["made_with"]
        now = self.state["identity"] | self.state["made_with"]
        lines = compare(then, now, sorted(then | now), str(other))
        for line in lines or ["code, libraries, data, base and device are those of the run that is rebuilt"]:
            say(line)

    def _made_with(self) -> dict[str, str]:
        commit = code_state()["commit"]
        return library_versions() | {"device": str(self.accelerator.device)} | ({"code": commit} if commit else {})

    def _begin(self, loop: Loop[B], checkpoint: Checkpoint | None, module: nn.Module, inputs: In, held_out: list[B]) -> int:
        """The step to go on from. A fresh run is measured first; a resumed one is put back as it was."""
        loop.state = self.state
        if checkpoint is None:
            before = self._measure(module, inputs, held_out, 0, trained=False)
            loop.tracker.rewind(-1)
            loop.tracker.log(0, before)
            loop.state["before"] = before
            return 0
        loop.restore(checkpoint)
        loop.tracker.rewind(checkpoint.step, checkpoint.state.get("lines"))
        say(f"going on from step {checkpoint.step} of {inputs.order.num_steps} ({checkpoint.path.name})")
        return checkpoint.step

    def _measure(self, module: nn.Module, inputs: In, held_out: list[B], done: int, trained: bool) -> dict[str, float]:
        own = self.measure(module, inputs, held_out, done, self.stop.check)
        return own | self.measure_more(module, inputs, trained)

    def _told(self, state: dict[str, Any]) -> dict[str, Any]:
        """What the manifest says of what did not go as planned."""
        told = {"changes": "changes", "batches_left_out": "left_out", "halved": "halved"}
        ended = {"ended": state["ended"]} if "ended" in state else {}
        return (
            {name: state.get(key, []) for name, key in told.items()}
            | ended
            | {
                "identity": state["identity"],
                "made_with": state["made_with"],
            }
        )

    def _finish(self, built: Any, inputs: In, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        said = self.save(built, inputs, state, after)
        manifest: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            manifest = self.run.finish(said | self._told(state) | self.remarks())
            show_outcome(self.run, manifest, run_page(self.run.dir))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return manifest


def _accelerator(cfg: Stage, run: Run) -> Accelerator:
    """With FSDP2 where the config, or accelerate's own, asks for it. UserError for a tracker that is not installed."""
    if cfg.tracker != "none" and find_spec(cfg.tracker) is None:
        raise UserError(f"tracker: {cfg.tracker} is not installed; pip install 'posttrain[{cfg.tracker}]'")
    fsdp = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap") if cfg.train.fsdp else None
    log_with = None if cfg.tracker == "none" else cfg.tracker
    accelerator = Accelerator(mixed_precision=_precision(cfg), log_with=log_with, project_dir=run.dir, fsdp_plugin=fsdp)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("train.fsdp: accelerate's config asks for FSDP version 1; set fsdp_version: 2 there")
        if not cfg.train.fsdp:
            raise UserError("train.fsdp: accelerate's config asks for FSDP; say train.fsdp=true too")
        plugin.cpu_ram_efficient_loading = False  # every process has read the weights
    return accelerator


def _precision(cfg: Stage) -> str:
    """Autocast, for accelerate: only where the weights are float32 and the device does bfloat16 faster."""
    if cfg.train.precision != "auto":
        return {"none": "no", "bf16": "bf16"}[cfg.train.precision]
    full_precision = cfg.model.dtype == "float32" or (cfg.model.dtype == "auto" and cfg.peft.output == "model")
    return "bf16" if full_precision and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def content_hash(*parts: Any) -> str:
    """A name for what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
