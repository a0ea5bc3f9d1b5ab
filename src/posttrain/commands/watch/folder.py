"""What is in a folder of runs: the runs themselves, and the sweeps and recipes that they belong to. Links are not followed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from posttrain.errors import UserError
from posttrain.launch.answers_step import GENERATE, ROWS
from posttrain.launch.sweep import JOBS
from posttrain.reports.recipe_page import recipe_state
from posttrain.reports.run_page import method_of
from posttrain.reports.run_records import parsed_lines
from posttrain.reports.sweep_page import sweep_state
from posttrain.runs.directory import CONFIG, read_config
from posttrain.runs.manifest import read_manifest
from posttrain.runs.status import last_change, read_status, standing

DEEPEST = 6  # folders within folders that are looked into
MOST = 5000  # runs that are listed
TAIL = 2**18  # bytes of the end of metrics.jsonl that are read
READ = (CONFIG, "metrics.jsonl", "manifest.json", "status.json", "samples.json", "held_out.json", "samples")
DIGEST = ".digest.json"  # of a recipe's step
T = TypeVar("T")


@dataclass(frozen=True)
class SeenRun:
    """A run as the table has it. name: its path in the folder; figures: the newest of each name."""

    name: str
    dir: Path
    stage: str
    model: str
    method: str
    state: str
    why: str
    step: int
    steps: int
    changed: float
    figures: dict[str, float]

    @property
    def speed(self) -> float | None:
        """Tokens or images a second."""
        return self.figures.get("train/tokens_per_second", self.figures.get("train/images_per_second"))


@dataclass(frozen=True)
class SeenGroup:
    """A sweep or a recipe. members: names of its runs; rows: as its page wants them."""

    name: str
    dir: Path
    kind: str
    state: str
    members: tuple[str, ...]
    rows: list[dict[str, Any]]


@dataclass
class Folder:
    """Looks into `root`; what has not changed since the last look is not read again."""

    root: Path
    _known: dict[Path, tuple[Any, Any]] = field(default_factory=dict[Path, tuple[Any, Any]])

    def runs(self) -> dict[str, SeenRun]:
        """By name, all runs that can be read."""
        found: dict[str, SeenRun] = {}
        for directory in self._directories():
            if (directory / CONFIG).is_file() and is_own(directory) and (run := self._run(directory)):
                found[run.name] = run
            if len(found) == MOST:
                break
        return found

    def groups(self, runs: dict[str, SeenRun]) -> dict[str, SeenGroup]:
        """By name, the sweeps and recipes, with those of `runs` that are theirs."""
        found: dict[str, SeenGroup] = {}
        for directory in self._directories():
            if (directory / CONFIG).exists():
                continue
            if kind := "sweep" if (directory / JOBS).exists() else "recipe" if steps_of(directory) else "":
                mine = {name: run for name, run in runs.items() if run.dir.parent == directory}
                rows = sweep_rows(directory, mine) if kind == "sweep" else recipe_steps(directory, mine)
                state_of = sweep_state if kind == "sweep" else recipe_state
                name, state = self._name(directory), state_of([row["status"] for row in rows])
                found[name] = SeenGroup(name, directory, kind, state, tuple(mine), rows)
        return found

    def _directories(self) -> Iterator[Path]:
        """All that may hold runs, from the root down; none that is a link, hidden, or within a run."""
        for at, below, files in os.walk(self.root, followlinks=False):
            place = Path(at)
            depth = len(place.relative_to(self.root).parts)
            is_leaf = CONFIG in files or depth == DEEPEST
            below[:] = [] if is_leaf else sorted(name for name in below if not name.startswith("."))
            yield place

    def _name(self, directory: Path) -> str:
        return directory.relative_to(self.root).as_posix()

    def _run(self, directory: Path) -> SeenRun | None:
        try:
            config = self._of_file(directory / CONFIG, lambda path: read_config(path.parent)) or {}
            done = self._of_file(directory / "manifest.json", lambda path: read_manifest(path.parent))
            figures = dict(self._of_file(directory / "metrics.jsonl", _newest) or {})
            status, stands = read_status(directory), standing(directory)
            figures |= done.metrics if done else {}
            planned = done.steps if done else status.steps if status else 0
            return SeenRun(
                name=self._name(directory),
                dir=directory,
                stage=str(config["stage"]),
                model=str(config["model"].get("name", "")),
                method=method_of(config),
                state=stands.state,
                why=stands.why,
                step=done.steps if done else int(figures.get("step", 0)),
                steps=planned or config["train"].get("max_steps") or 0,
                changed=last_change(directory),
                figures=figures,
            )
        except (UserError, OSError, KeyError, TypeError, ValueError, AttributeError) as error:
            return self._damaged(directory, error)

    def _damaged(self, directory: Path, error: Exception) -> SeenRun | None:
        """What cannot be read, with the reason; None where it was taken away meanwhile."""
        if not (directory / CONFIG).is_file():
            return None
        why = str(error) if isinstance(error, UserError) else f"{directory / CONFIG} is not as posttrain writes it"
        return SeenRun(self._name(directory), directory, "", "", "", "damaged", why, 0, 0, last_change(directory), {})

    def _of_file(self, path: Path, read: Callable[[Path], T]) -> T | None:
        """What `read` makes of a file, as long as that stays as it is; None where there is none."""
        try:
            stat = path.stat()
        except FileNotFoundError:
            return None
        stamp = (stat.st_mtime_ns, stat.st_size, stat.st_ino)
        if path not in self._known or self._known[path][0] != stamp:
            self._known[path] = (stamp, read(path))
        return self._known[path][1]


def is_own(directory: Path) -> bool:
    """Is nothing that a page of this run reads a link?"""
    if any((directory / name).is_symlink() for name in READ):
        return False
    return not any(path.is_symlink() for path in (directory / "samples").rglob("*"))


def steps_of(directory: Path) -> list[Path]:
    """Directories of a recipe's steps, in order; empty where it is none."""
    names = [path.name.removesuffix(DIGEST) for path in directory.glob(f"[0-9]*-*{DIGEST}")]
    return [directory / name for name in sorted(names, key=lambda name: (int(name.partition("-")[0]), name))]


def recipe_steps(place: Path, runs: dict[str, SeenRun]) -> list[dict[str, Any]]:
    """The steps of a recipe as its page wants them, as far as they lie in its folder."""
    found: list[dict[str, Any]] = []
    of_dir = {run.dir: run for run in runs.values()}
    for directory in steps_of(place):
        run = of_dir.get(directory)
        state = run.state if run else "done" if (directory / ROWS).is_file() else "to do"
        where = str(directory) if run else str(directory / "nowhere")  # what is no run of this folder is not read
        entry = {"name": directory.name.partition("-")[2], "stage": run.stage if run else GENERATE, "dir": where}
        found.append(entry | {"status": state, "why": run.why if run else "", "seconds": 0.0})
    return found


def sweep_rows(place: Path, runs: dict[str, SeenRun]) -> list[dict[str, Any]]:
    """The jobs of a sweep as its page wants them; those that lie elsewhere are left out."""
    path = place / JOBS
    try:
        jobs: list[dict[str, Any]] = [] if path.is_symlink() else json.loads(path.read_text(encoding="utf-8"))
        named = [(place / Path(job["dir"]).name, job["overrides"]) for job in jobs]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    found: list[dict[str, Any]] = []
    of_dir = {run.dir: run for run in runs.values()}
    for directory, overrides in named:
        run = of_dir.get(directory)
        if run is None:
            found.append({"overrides": overrides, "status": "to do", "dir": str(directory / "nowhere"), "metrics": {}})
        else:
            row = {"overrides": overrides, "status": run.state, "dir": str(directory), "metrics": run.figures}
            found.append(row | ({"error": run.why} if run.state == "failed" else {}))
    return found


def _newest(path: Path) -> dict[str, float]:
    """The last value of each figure near the end of a file of metrics."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL))
        text = file.read().decode("utf-8", errors="replace")
    return {name: value for line in parsed_lines(text) for name, value in line.items()}
