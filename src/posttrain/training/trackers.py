"""Runs of trackers: under which names they begin, that a run which goes on goes on in the same one, and how they end.

What a tracker is told goes through accelerate's classes; here is what those leave open.
"""

from __future__ import annotations

import json
import re
import uuid
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import GeneralTracker, MLflowTracker, TensorBoardTracker, TrackioTracker, WandBTracker
from filelock import FileLock

from posttrain.config.schema import TrackConfig
from posttrain.console import say
from posttrain.errors import Stopped, UserError, first_line
from posttrain.runs.files import TRACKING, write_json
from posttrain.runs.identity import flatten

KNOWN = "runs.json"  # in the run's directory of tracking: by tracker, the project and the id of its run


@dataclass(frozen=True)
class Names:
    """What a tracker's run is called. id: None for one that begins and was given none; known: an earlier start has begun it.
    step: the first that will be told; directory: for the tracker's files; place: of its data, unless the user has said where."""

    project: str
    name: str
    tags: tuple[str, ...]
    group: str | None
    id: str | None
    known: bool
    step: int
    directory: Path
    place: str | None = None


class Backend(Protocol):
    """What is different from tracker to tracker."""

    def begin(self, names: Names) -> tuple[GeneralTracker, Names]:
        """Begin the run, or go on with it; the names with the id and the place by which it is found again."""
        ...

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        """Upload files, by their names in the run's directory."""
        ...

    def end(self, tracker: Any, names: Names, code: int) -> None:
        """The run ends with this exit code; all is written."""
        ...


class TensorBoard:
    """Its run is a directory: the same one, in which what is told again takes the place of what was told before."""

    def begin(self, names: Names) -> tuple[GeneralTracker, Names]:
        folder = re.sub(r"[/\\]", "_", names.project)
        again = {"purge_step": names.step} if names.known else {}
        tracker = TensorBoardTracker(folder, names.directory, **again)
        tracker.start()
        if not names.known:
            tracker.writer.add_text("run", f"{names.name}; group {names.group or 'none'}; tags {', '.join(names.tags) or 'none'}")
        return tracker, replace(names, id=folder)

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        raise AssertionError("the schema allows no track.artifacts")

    def end(self, tracker: Any, names: Names, code: int) -> None:
        tracker.finish()


class Wandb:
    """Its runs have ids that are the user's to give."""

    def begin(self, names: Names) -> tuple[GeneralTracker, Names]:
        names = replace(names, id=names.id or uuid.uuid4().hex[:16])
        own = {"id": names.id, "name": names.name, "tags": list(names.tags), "group": names.group}
        tracker = WandBTracker(names.project, resume="allow", **own)
        tracker.start()
        return tracker, names

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        from wandb import Artifact

        tracker.run.log_artifact(_filled(Artifact(_artifact_name(names), type="run"), files))

    def end(self, tracker: Any, names: Names, code: int) -> None:
        tracker.run.finish(exit_code=code)


class Trackio:
    """It finds a run again by its name alone: the id stands behind it."""

    def begin(self, names: Names) -> tuple[GeneralTracker, Names]:
        names = replace(names, id=names.id or f"{names.name}-{uuid.uuid4().hex[:8]}")
        resume = "must" if names.known else "allow"
        tracker = TrackioTracker(names.project, name=names.id, group=names.group, resume=resume)
        tracker.start()
        if names.tags:
            tracker.run.config["tags"] = list(names.tags)
        return tracker, names

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        from trackio import Artifact

        tracker.run.log_artifact(_filled(Artifact(_artifact_name(names), type="run"), files))

    def end(self, tracker: Any, names: Names, code: int) -> None:
        tracker.finish()


class Mlflow:
    """It gives the ids itself. Its data is in a database of the working directory unless the user has said where."""

    DATABASE = "mlflow.db"

    def begin(self, names: Names) -> tuple[GeneralTracker, Names]:
        import mlflow

        if not mlflow.is_tracking_uri_set():
            names = replace(names, place=names.place or f"sqlite:///{Path(self.DATABASE).resolve()}")
            mlflow.set_tracking_uri(names.place)
        marks: dict[str, Any] = {tag.partition("=")[0]: tag.partition("=")[2] or "true" for tag in names.tags}
        marks |= {"group": names.group} if names.group else {}
        tracker = MLflowTracker(names.project, run_id=names.id, run_name=names.name, tags=marks)
        # jobs of a sweep would make the database's tables at once
        with FileLock(names.place.removeprefix("sqlite:///") + ".lock") if names.place else nullcontext():
            tracker.start()
        return tracker, replace(names, id=tracker.active_run.info.run_id)

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        for name, file in files.items():
            parent = str(Path(name).parent)
            tracker.log_artifact(str(file), None if parent == "." else parent)

    def end(self, tracker: Any, names: Names, code: int) -> None:
        import mlflow

        mlflow.end_run({0: "FINISHED", Stopped.exit_code: "KILLED"}.get(code, "FAILED"))
        if names.place:
            mlflow.set_tracking_uri("")  # of this process's next run another


BACKENDS: dict[str, Backend] = {"tensorboard": TensorBoard(), "wandb": Wandb(), "trackio": Trackio(), "mlflow": Mlflow()}


class TrackedRun:
    """A tracker's run. One that fails on the way ends no training: it is said once, and the manifest counts what is missing."""

    def __init__(self, kind: str, tracker: GeneralTracker, names: Names) -> None:
        self.kind, self.backend, self.tracker, self.names = kind, BACKENDS[kind], tracker, names
        self.lost = 0

    def log(self, values: dict[str, float], step: int) -> None:
        """Tell the tracker, unless it has failed before: one that does not answer would hold up every step."""
        if self.lost or not self._done(
            lambda: self.tracker.log(values, step=step), "is told nothing more; metrics.jsonl has it all"
        ):
            self.lost += 1

    def keep(self, files: dict[str, Path]) -> None:
        """Upload a finished run's files, by their names in its directory."""
        self._done(lambda: self.backend.keep(self.tracker, self.names, files), "has not got all files of the result")

    def end(self, code: int) -> None:
        """The run is over, with this exit code."""
        self._done(lambda: self.backend.end(self.tracker, self.names, code), "may lack what came last; metrics.jsonl has it all")

    def record(self) -> dict[str, Any]:
        """For the manifest."""
        return {"name": self.kind, "project": self.names.project, "id": self.names.id, "lost": self.lost}

    def _done(self, tell: Callable[[], None], but: str) -> bool:
        try:
            tell()
        except Exception as error:
            say(f"tracker: {self.kind} failed ({first_line(error)}): it {but}")
            return False
        return True


def require_installed(kind: str) -> None:
    """Raises UserError for a tracker that is not installed."""
    spec = None if kind == "none" else find_spec(kind)
    if kind != "none" and (spec is None or spec.origin is None):  # a directory of that name is no package
        raise UserError(f"tracker: {kind} is not installed; pip install 'posttrain[{kind}]'")


def begin(kind: str, track: TrackConfig, directory: Path, config: dict[str, Any], step: int) -> TrackedRun:
    """The tracker's run of the run in `directory`, which will log from `step` on: a new one, or that of an earlier start.

    Raises UserError where the tracker cannot begin it.
    """
    place = directory / TRACKING
    known = _known(place)
    earlier = known.get(kind, {})
    if earlier.get("project") != track.project or track.id not in (None, earlier.get("id")):
        earlier = {}
    names = Names(
        project=track.project,
        name=track.name or directory.resolve().name,
        tags=tuple(track.tags),
        group=track.group,
        id=track.id or earlier.get("id"),
        known=bool(earlier),
        step=step,
        directory=place,
        place=earlier.get("place"),
    )
    try:
        tracker, names = BACKENDS[kind].begin(names)
        if not names.known:
            tracker.store_init_configuration(_plain(config))
    except Exception as error:
        fix = f"delete {place / KNOWN} for a new run, or say tracker=none" if earlier else "tracker=none does without"
        raise UserError(f"tracker: {kind} cannot {'go on' if earlier else 'begin'}: {first_line(error)}; {fix}") from None
    write_json(place / KNOWN, known | {kind: {"project": names.project, "id": names.id, "place": names.place}})
    where = f" in {names.place}" if names.place else ""
    say(f"tracker: {kind}, project {names.project}, run {names.id}{' goes on' if names.known else ''}{where}")
    return TrackedRun(kind, tracker, names)


def _known(place: Path) -> dict[str, Any]:
    place.mkdir(exist_ok=True)
    try:
        found = json.loads((place / KNOWN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise UserError(
            f"{place / KNOWN} cannot be read ({first_line(error)}); delete it, and the tracker begins a new run"
        ) from None
    return found if isinstance(found, dict) else {}


def _plain(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value if isinstance(value, bool | int | float | str) else str(value) for key, value in flatten(config).items()}


def _artifact_name(names: Names) -> str:
    return re.sub(r"[^\w.-]", "-", names.name)[:100]


def _filled(artifact: Any, files: dict[str, Path]) -> Any:
    for name, file in files.items():
        artifact.add_file(str(file), name=name)
    return artifact
