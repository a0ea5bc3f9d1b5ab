"""Where a run's metrics go: always to metrics.jsonl, and to the tracker that the user named."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

from accelerate import Accelerator

from posttrain.config.schema import TrackConfig
from posttrain.errors import RunError
from posttrain.runs.files import write_text
from posttrain.training.listeners import tell
from posttrain.training.processes import Processes
from posttrain.training.trackers import TrackedRun, begin


class Page(Protocol):
    """A page that shows the metrics."""

    def log(self) -> None:
        """There are new ones."""
        ...


class Tracker:
    """Appends a line a logged step; after a resume the lines of steps that are run again are dropped first. lines: how many there
    are, which a checkpoint remembers. Inside of `with` the tracker's run is open; how the block ends is how that run ends."""

    def __init__(self, path: Path, accelerator: Accelerator) -> None:
        self.path, self.accelerator, self.lines = path, accelerator, 0
        self.told: TrackedRun | None = None  # in rank 0, where there is a tracker
        self.page: Page | None = None  # in rank 0, from the first step

    def begin(self, kind: str, track: TrackConfig, config: dict[str, Any], step: int) -> None:
        """Begin the tracker's run, or go on with it from `step`; every process must call it. Raises UserError."""

        def begin_here() -> None:
            self.told = begin(kind, track, self.path.parent, config, step)

        if kind != "none":
            Processes.of(self.accelerator).told(begin_here)

    def __enter__(self) -> Tracker:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.told:
            self.told.end(getattr(error, "exit_code", RunError.exit_code) if error else 0)

    def keep(self, files: list[str]) -> None:
        """Upload files of the run's directory, where there is a tracker."""
        if self.told:
            self.told.keep({name: self.path.parent / name for name in files})

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {"tracker": self.told.record()} if self.told else {}

    def rewind(self, step: int, lines: int | None = None) -> None:
        """Keep the lines up to `step`, as far as they are whole, and of those the first `lines`: what was measured after the last
        step's checkpoint will be measured again."""
        if not (self.accelerator.is_main_process and self.path.exists()):
            return
        kept = [line for line in self.path.read_text(encoding="utf-8", errors="replace").splitlines() if _step_of(line) <= step][
            :lines
        ]
        self.lines = len(kept)
        write_text(self.path, "".join(line + "\n" for line in kept))

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a line of finite values, here and to the tracker."""
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON knows no NaN
        self.lines += 1
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")
            tell(step, values)
        if self.told:
            self.told.log(values, step)
        if self.page:
            self.page.log()


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short
