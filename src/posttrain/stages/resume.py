"""What a run goes on from: the newest good checkpoint, and whether it is of this very run."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.console import say
from posttrain.data.collate import BatchSampler
from posttrain.errors import UserError, of_all
from posttrain.runs.directory import Run
from posttrain.runs.earlier import as_of_today, current_state
from posttrain.runs.identity import allowed, code_state, compare, identity_of, library_versions
from posttrain.runs.manifest import read_manifest
from posttrain.stages.steps import Prepared
from posttrain.training.checkpoint import Checkpoint, newest_checkpoint
from posttrain.training.processes import Processes
from posttrain.training.state import TrainState


@dataclass(frozen=True)
class History:
    """checkpoint: None for a run that begins. state: as the checkpoint left it, or new."""

    run: Run
    checkpoint: Checkpoint | None
    state: TrainState

    @property
    def first_step(self) -> int:
        """The first that will be logged anew."""
        return self.checkpoint.step + 1 if self.checkpoint else 0

    def hold(self, name: str, now: dict[str, Any], quietly: bool = False) -> None:
        """Have checkpoints hold, as the state's field `name`, what makes the run itself. quietly: what a difference that was
        named before explains goes without saying.

        Raises UserError where the checkpoint that it goes on from holds another, and neither `resume.allow` names the
        difference nor a difference that was named before explains it.
        """
        then = getattr(self.state, name)
        if self.checkpoint:
            follows = any(change["step"] == self.checkpoint.step for change in self.state.changes)
            whose = f"{self.checkpoint.path} is of another run"
            then, incomparable = as_of_today(then, now)
            lines = incomparable + compare(then, now, list(now) if follows else allowed(self.run.config), whose)
            self.note([] if follows and quietly else lines)
        setattr(self.state, name, now)

    def note(self, lines: list[str]) -> None:
        """Say what has changed since the checkpoint, and keep it for the manifest."""
        for line in lines:
            assert self.checkpoint
            say(f"from step {self.checkpoint.step} {line}")
            self.state.changes.append({"step": self.checkpoint.step, "change": line})


def open_history(cfg: Any, run: Run, prepared: Prepared[Any], processes: Processes) -> History:
    """The checkpoint to go on from, which rank 0 verifies and tells of, before a weight of the base is loaded.

    Raises UserError where none is whole, or it is of another run than this one and `resume.allow` does not name the difference.
    """
    checkpoint, damaged = processes.told(lambda: newest_checkpoint(run.checkpoints))
    for line in damaged:
        say(f"{line}; going on from the newest good one")
    state = TrainState.from_dict(current_state(checkpoint.state)) if checkpoint else TrainState()
    history = History(run, checkpoint, state)
    history.hold("identity", identity_of(run.config) | prepared.identity)
    history.hold("order", {"data.order": order_hash(prepared.order)}, quietly=True)
    then, now = state.made_with, made_with(processes.device)
    differs = [name for name, value in now.items() if then.get(name) != value] if checkpoint else []
    history.note([f"{name} was {then.get(name)}, is now {now[name]}: the rest may not be bit-identical" for name in differs])
    state.made_with = now
    if checkpoint is None and cfg.run.reproduces:
        _say_what_differs(state, Path(cfg.run.reproduces))
    return history


def agree_on(processes: Processes, identity: dict[str, Any]) -> None:
    """Raises UserError where another process has read something else: another machine has its own files and caches."""
    for rank, other in enumerate(processes.gathered(identity)):
        if wrong := next((key for key in sorted(identity | other) if other.get(key) != identity.get(key)), None):
            said = f"{wrong} is {identity.get(wrong)} in rank {processes.rank} and {other.get(wrong)} in rank {rank}"
            raise of_all(UserError(f"{said}; give every machine the same files"))


def order_hash(order: BatchSampler) -> str:
    """Names which units a run draws when."""
    return hashlib.sha256(order.drawn.tobytes()).hexdigest()[:32]


def made_with(device: torch.device) -> dict[str, str]:
    """Versions of the libraries, device, and commit of this code where it is known."""
    commit = code_state()["commit"]
    return library_versions() | {"device": str(device)} | ({"code": commit} if commit else {})


def _say_what_differs(state: TrainState, other: Path) -> None:
    """From a finished run that this one rebuilds."""
    manifest = read_manifest(other)
    identity, lines = as_of_today(manifest.identity, state.identity)
    then, now = identity | manifest.made_with, state.identity | state.made_with
    lines += compare(then, now, sorted(then | now), str(other))
    for line in lines or ["code, libraries, data, base and device are those of the run that is rebuilt"]:
        say(line)
