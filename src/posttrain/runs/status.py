"""Where a run stands: what it says itself in status.json, and whether that is still true. No torch."""

from __future__ import annotations

import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import psutil

from posttrain.runs.files import HOST, STATUS, write_json
from posttrain.runs.manifest import is_finished, is_number

SILENCE = 3600.0  # seconds without a word, after which a process of another machine counts as gone
State = Literal["running", "done", "stopped", "failed", "unfinished"]
_STATES = ("running", "stopped", "failed")


@dataclass(frozen=True)
class Status:
    """What a run says of itself.

    Args:
        why: a line, of one that has ended before its end.
        steps: of the whole run; 0 before it is known.
        start, began: the step that this start trains from, and when it began to, by the clock.
        host, pid, born: the process, and when it was started.
    """

    state: str
    why: str = ""
    steps: int = 0
    start: int = 0
    began: float = 0.0
    host: str = ""
    pid: int = 0
    born: float = 0.0

    @classmethod
    def of_this_process(cls) -> Status:
        """Of a run that this process has just begun, or goes on with."""
        return cls("running", host=HOST, pid=os.getpid(), born=psutil.Process().create_time())

    def left(self, done: int, now: float) -> float | None:
        """Seconds that the steps after `done` will take, if they go as those of this start; None where that cannot be said."""
        made = done - self.start
        return (now - self.began) / made * (self.steps - done) if made > 0 and self.began and self.steps else None


@dataclass(frozen=True)
class Standing:
    """state: running, done, stopped, failed, or unfinished where nobody knows; why: a line on it."""

    state: State
    why: str = ""


def write_status(directory: Path, status: Status) -> None:
    """Say in `directory` where its run stands."""
    write_json(directory / STATUS, asdict(status))


def read_status(directory: Path) -> Status | None:
    """What the run in `directory` has said last; None where it said nothing that can be read."""
    try:
        found: Any = json.loads((directory / STATUS).read_text(encoding="utf-8"))
        status = Status(**found)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    numbers = (status.steps, status.start, status.began, status.pid, status.born)
    texts: tuple[Any, ...] = (status.why, status.host)  # of a file that anybody may have written
    is_right = status.state in _STATES and all(map(is_number, numbers)) and all(isinstance(text, str) for text in texts)
    return status if is_right else None


def standing(directory: Path, now: float | None = None) -> Standing:
    """Where the run in `directory` truly stands: one whose process is gone is not running, whatever it said last."""
    if is_finished(directory):
        return Standing("done")
    status = read_status(directory)
    if status is None:
        return Standing("unfinished", "it has not said how it ended")
    if status.state == "stopped":
        return Standing("stopped", status.why)
    if status.state == "failed":
        return Standing("failed", status.why)
    if status.host == HOST:
        return Standing("running") if _lives(status) else Standing("stopped", "its process is gone; the same command goes on")
    if (time.time() if now is None else now) - last_change(directory) < SILENCE:
        return Standing("running", f"on {status.host}")
    return Standing("unfinished", f"nothing was heard of it for an hour from {status.host}")


def ended(directory: Path, state: Literal["stopped", "failed"], why: str) -> None:
    """Say that the run in `directory` has ended before its end, where it had said that it runs."""
    if status := read_status(directory):
        write_status(directory, replace(status, state=state, why=why))


def last_change(directory: Path) -> float:
    """When a run has written its last metrics, or said where it stands, by the clock; 0 where it never did."""
    files = (directory / name for name in ("metrics.jsonl", STATUS, "manifest.json"))
    return max((file.stat().st_mtime for file in files if file.exists()), default=0.0)


def _lives(status: Status) -> bool:
    """Is the process there, and no other one of its number?"""
    try:
        return abs(psutil.Process(status.pid).create_time() - status.born) < 1.0
    except (psutil.Error, ValueError, OverflowError):
        return False
