"""Trackers: one run of theirs for one run of ours, however often it is started. Those that are not installed are skipped:
`pip install 'posttrain[wandb,trackio,mlflow]'` brings them."""

from __future__ import annotations

import json
import os
import sqlite3
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState

from posttrain.config.schema import TrackConfig
from posttrain.errors import RunError, Stopped, UserError
from posttrain.runs.files import TRACKING, file_hashes
from posttrain.training import trackers
from posttrain.training.trackers import Names, begin, require_installed

TRACK = TrackConfig(project="mine", name=None, tags=["a", "b=2"], group="all", id=None, artifacts=False)
CONFIG = {"optim": {"lr": 0.5}, "eval": {"sets": None}}


class Recorded:
    """A tracker that keeps what it is told, and fails where it is asked to."""

    def __init__(self) -> None:
        self.begun: list[Names] = []
        self.told: list[Any] = []
        self.fails: set[str] = set()

    def begin(self, names: Names) -> tuple[Any, Names]:
        self._do("begin", names)
        self.begun.append(names)
        return self, replace(names, id=names.id or f"id{len(self.begun)}")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self._do("config", values)

    def log(self, values: dict[str, float], step: int) -> None:
        self._do("log", values)

    def keep(self, tracker: Any, names: Names, files: dict[str, Path]) -> None:
        self._do("keep", sorted(files))

    def end(self, tracker: Any, names: Names, code: int) -> None:
        self._do("end", code)

    def _do(self, what: str, value: Any) -> None:
        if what in self.fails:
            raise ConnectionError("no route\nto the host")
        self.told.append((what, value))


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> Recorded:
    found = Recorded()
    monkeypatch.setitem(trackers.BACKENDS, "wandb", found)
    return found


def test_a_run_goes_on_in_the_same_one_and_tells_its_config_once(recorded: Recorded, tmp_path: Path) -> None:
    for step in (0, 3):
        begin("wandb", TRACK, tmp_path, CONFIG, step).log({"loss": 1.0}, step)
    assert [(each.id, each.known, each.step) for each in recorded.begun] == [(None, False, 0), ("id1", True, 3)]
    assert [what for what, _ in recorded.told] == ["begin", "config", "log", "begin", "log"]
    assert dict(recorded.told)["config"] == {"optim.lr": 0.5, "eval.sets": "None"}
    first = recorded.begun[0]
    assert (first.project, first.name, first.tags, first.group) == ("mine", tmp_path.name, ("a", "b=2"), "all")


@pytest.mark.parametrize("other", [{"project": "other"}, {"id": "given"}])
def test_another_project_or_id_is_another_run(recorded: Recorded, tmp_path: Path, other: dict[str, str]) -> None:
    begin("wandb", TRACK, tmp_path, CONFIG, 0)
    begin("wandb", TRACK.model_copy(update=other), tmp_path, CONFIG, 2)
    assert [each.known for each in recorded.begun] == [False, False] and recorded.begun[1].id == other.get("id")


def test_a_tracker_that_cannot_begin_is_one_line(recorded: Recorded, tmp_path: Path) -> None:
    recorded.fails = {"begin"}
    with pytest.raises(UserError, match=r"^tracker: wandb cannot begin: no route; tracker=none does without$"):
        begin("wandb", TRACK, tmp_path, CONFIG, 0)
    recorded.fails = set()
    begin("wandb", TRACK, tmp_path, CONFIG, 0)
    recorded.fails = {"begin"}
    with pytest.raises(UserError, match=r"cannot go on: no route; delete .*runs\.json for a new run, or say tracker=none$"):
        begin("wandb", TRACK, tmp_path, CONFIG, 0)


def test_a_tracker_that_fails_later_ends_no_run_and_is_asked_no_more(
    recorded: Recorded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = begin("wandb", TRACK, tmp_path, CONFIG, 0)
    run.log({"loss": 1.0}, 1)
    recorded.fails = {"log", "end", "keep"}
    capsys.readouterr()
    run.log({"loss": 0.9}, 2)
    recorded.fails -= {"log"}
    run.log({"loss": 0.8}, 3)
    assert capsys.readouterr().out == "tracker: wandb failed (no route): it is told nothing more; metrics.jsonl has it all\n"
    assert run.record() == {"name": "wandb", "project": "mine", "id": "id1", "lost": 2}
    run.keep({"x": tmp_path / "x"})
    run.end(0)
    said = capsys.readouterr().out.splitlines()
    assert [line.partition("): ")[2][:14] for line in said] == ["it has not got", "it may lack wh"]


def test_one_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trackio").mkdir()  # what its own data is called is no package
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr("posttrain.training.trackers.find_spec", lambda kind: None)
    with pytest.raises(UserError, match=r"^tracker: trackio is not installed; pip install 'posttrain\[trackio\]'$"):
        require_installed("trackio")
    require_installed("none")


def test_what_a_tracker_writes_is_no_part_of_the_result(recorded: Recorded, tmp_path: Path) -> None:
    begin("wandb", TRACK, tmp_path, CONFIG, 0)
    assert (tmp_path / TRACKING / trackers.KNOWN).exists() and file_hashes(tmp_path) == {}


# the real packages, without a network


@pytest.fixture
def real(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A run's directory in a working directory of its own."""
    PartialState()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DATA_DIR", str(tmp_path))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "weights.bin").write_text("weights")
    return tmp_path / "run"


def both_starts(kind: str, run: Path, artifacts: bool = True) -> str:
    """Steps 1 to 3, of which a checkpoint holds two; then 3 to 4, and the end. The id."""
    for first, last in ((0, 3), (3, 4)):
        told = begin(kind, TRACK, run, CONFIG, first)
        for step in range(first, last + 1):
            told.log({"loss": 10.0 - step}, step)
        if last == 4 and artifacts:
            told.keep({"weights.bin": run / "weights.bin", "deep/weights.bin": run / "weights.bin"})
        told.end(Stopped.exit_code if last == 3 else 0)
    assert told.lost == 0 and told.names.id
    return told.names.id


def test_tensorboard_goes_on_in_its_directory_and_drops_what_is_told_again(real: Path) -> None:
    reading = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="tensorboard is not installed")
    both_starts("tensorboard", real, artifacts=False)
    found = reading.EventAccumulator(str(real / TRACKING / "mine"))
    found.Reload()
    assert [(each.step, each.value) for each in found.Scalars("loss")] == [(step, 10.0 - step) for step in range(5)]
    assert (
        len([each for each in (real / TRACKING / "mine").iterdir() if each.is_dir()]) == 2
    )  # the config, once: two of accelerate's


def test_wandb_goes_on_under_its_id(real: Path) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    number = both_starts("wandb", real)
    runs = sorted(real.parent.glob("wandb/offline-run-*"))
    assert len(runs) == 2 and all(each.name.endswith(f"-{number}") for each in runs)
    expected = {b"mine", b"all", b"b=2", b"deep/weights.bin", b"optim.lr"}
    deadline = time.monotonic() + 10  # a process of its own writes
    while expected and time.monotonic() < deadline:
        whole = b"".join(file.read_bytes() for each in runs for file in each.glob("*.wandb"))
        expected = {words for words in expected if words not in whole}
    assert not expected


def test_mlflow_goes_on_in_a_database_of_the_working_directory(real: Path) -> None:
    pytest.importorskip("mlflow", reason="mlflow is not installed")
    number = both_starts("mlflow", real)
    database = sqlite3.connect(real.parent / "mlflow.db")
    assert database.execute("select run_uuid, status, name from runs").fetchall() == [(number, "FINISHED", "run")]
    steps = database.execute("select distinct step, value from metrics where key = 'loss' order by step").fetchall()
    assert steps == [(step, 10.0 - step) for step in range(5)]
    tags = dict(database.execute("select key, value from tags").fetchall())
    assert (tags["a"], tags["b"], tags["group"]) == ("true", "2", "all")
    (uri,) = database.execute("select artifact_uri from runs").fetchone()
    kept = Path(uri.removeprefix("file://"))
    assert (kept / "deep" / "weights.bin").read_text() == (kept / "weights.bin").read_text() == "weights"
    os.chdir(real)  # another working directory: the run knows its database
    again = begin("mlflow", TRACK, real, CONFIG, 5)
    again.end(RunError.exit_code)
    assert again.names.id == number and database.execute("select status from runs").fetchall() == [("FAILED",)]
    known = real / TRACKING / trackers.KNOWN
    known.write_text(known.read_text().replace(number, "0" * 32))
    with pytest.raises(UserError, match=r"^tracker: mlflow cannot go on: .*delete .*runs\.json"):
        begin("mlflow", TRACK, real, CONFIG, 5)


def test_trackio_goes_on_under_its_name(real: Path) -> None:
    pytest.importorskip("trackio", reason="trackio is not installed")
    number = both_starts("trackio", real)
    from trackio.sqlite_storage import SQLiteStorage

    assert number.startswith("run-") and SQLiteStorage.get_runs("mine") == [number]
    steps = [(each["step"], each["loss"]) for each in SQLiteStorage.get_logs("mine", number)]
    assert sorted(set(steps)) == [(step, 10.0 - step) for step in range(5)]


def test_the_file_of_known_runs_names_itself_where_it_is_damaged(recorded: Recorded, tmp_path: Path) -> None:
    begin("wandb", TRACK, tmp_path, CONFIG, 0)
    (tmp_path / TRACKING / trackers.KNOWN).write_text("{")
    with pytest.raises(UserError, match=r"runs\.json cannot be read .*; delete it"):
        begin("wandb", TRACK, tmp_path, CONFIG, 0)
    (tmp_path / TRACKING / trackers.KNOWN).write_text(json.dumps([]))
    assert not begin("wandb", TRACK, tmp_path, CONFIG, 0).names.known
