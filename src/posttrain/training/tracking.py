"""Where a run's metrics go: always to metrics.jsonl, and to the tracker that the user named, through accelerate."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from posttrain.runs.files import write_text
from posttrain.runs.identity import flatten


class Tracker:
    """Appends a line a logged step; after a resume the lines of steps that are run again are dropped first. lines: how many there
    are, which a checkpoint remembers."""

    def __init__(self, path: Path, accelerator: Accelerator, tracker: str, config: dict[str, Any]) -> None:
        self.path, self.accelerator, self.lines = path, accelerator, 0
        if tracker != "none":
            plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(config).items()}
            accelerator.init_trackers("posttrain", config=plain)

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
        values = {name: value for name, value in values.items() if math.isfinite(value)}  # JSON knows no NaN
        self.lines += 1
        if self.accelerator.is_main_process:
            with self.path.open("a", encoding="utf-8") as f:
                f.write(json.dumps({"step": step, **values}) + "\n")
        self.accelerator.log(values, step=step)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (ValueError, KeyError, TypeError):
        return float("inf")  # a line that a kill cut short
