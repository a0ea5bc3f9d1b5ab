"""Where a run stands: as it says, unless its process is gone."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from posttrain.runs.files import file_hashes
from posttrain.runs.status import STATUS, Standing, Status, ended, read_status, standing, write_status


def test_a_run_stands_as_it_says_while_its_process_lives(tmp_path: Path) -> None:
    status = Status.of_this_process()
    write_status(tmp_path, status)
    assert read_status(tmp_path) == status and status.pid == os.getpid()
    assert standing(tmp_path) == Standing("running")
    ended(tmp_path, "failed", "the disk is full")
    assert standing(tmp_path) == Standing("failed", "the disk is full")
    (tmp_path / "manifest.json").touch()
    assert standing(tmp_path) == Standing("done")


def test_a_killed_run_does_not_run_for_ever(tmp_path: Path) -> None:
    """Neither by its number, which is nobody's now, nor by one that another process has since."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    child.wait()
    write_status(tmp_path, replace(Status.of_this_process(), pid=child.pid))
    assert standing(tmp_path).state == "stopped" and "process is gone" in standing(tmp_path).why
    mine = Status.of_this_process()
    write_status(tmp_path, replace(mine, born=mine.born - 60))
    assert standing(tmp_path).state == "stopped"


def test_of_another_machine_an_hour_of_silence_says_that_nobody_knows(tmp_path: Path) -> None:
    write_status(tmp_path, replace(Status.of_this_process(), host="elsewhere", pid=1))
    written = (tmp_path / STATUS).stat().st_mtime
    assert standing(tmp_path, now=written + 3599) == Standing("running", "on elsewhere")
    assert standing(tmp_path, now=written + 3601).state == "unfinished"


@pytest.mark.parametrize(
    "text",
    ["", "[]", "[1]", "{}", '{"state": "done"}', '{"state": "running", "pid": "1"}', '{"state": "running", "more": 1}'],
)
def test_what_cannot_be_read_says_nothing(tmp_path: Path, text: str) -> None:
    (tmp_path / STATUS).write_text(text)
    assert read_status(tmp_path) is None
    assert standing(tmp_path).state == "unfinished"
    ended(tmp_path, "stopped", "now")
    assert (tmp_path / STATUS).read_text() == text


def test_time_left_is_that_of_this_start() -> None:
    """20 of 100 steps were made before; 30 more took 60 s: 50 are left, 2 s each."""
    status = replace(Status.of_this_process(), steps=100, start=20, began=1000.0)
    assert status.left(50, now=1060.0) == 100.0
    assert status.left(20, now=1060.0) is None and replace(status, steps=0).left(50, now=1060.0) is None


def test_it_is_no_part_of_the_result(tmp_path: Path) -> None:
    write_status(tmp_path, Status.of_this_process())
    (tmp_path / "report.html").touch()
    (tmp_path / "metrics.jsonl").touch()
    assert list(file_hashes(tmp_path)) == ["metrics.jsonl"]
    assert set(json.loads((tmp_path / STATUS).read_text())) == {*Status.__dataclass_fields__}
