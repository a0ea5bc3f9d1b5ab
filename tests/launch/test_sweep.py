"""Sweeps of real, tiny runs: a failing job does not take the others along, the same seed gives the same numbers."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RunError, UserError
from posttrain.launch.subprocess_runner import PYTHON
from posttrain.launch.sweep import run_sweep
from posttrain.reports.run_records import show

TINY = ["model=tiny", "train.max_steps=2", "train.batch_size=2", "train.grad_accum=1", "data.max_rows=24", "data.eval_rows=4"]
TINY += ["eval.rows=2", "optim.lr=0.01"]
pytestmark = pytest.mark.slow


def figures(rows: list[dict[str, Any]]) -> list[tuple[dict[str, str], float]]:
    return [(row["overrides"], row["metrics"]["eval/loss"]) for row in rows]


def test_a_failing_job_leaves_the_others_their_results(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """r=9999 passes every check of the config, and fails when the model is there: one of two jobs ends."""
    words = [*TINY, "+peft=qlora", "peft.r=2,9999", "peft.alpha=8", f"run.dir={tmp_path}/sweep"]
    with pytest.raises(RunError, match=r"1 of 2 jobs failed; see .*job\.log"):
        run_sweep("sft", words, None)
    rows = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["done", "failed"]
    assert [row["overrides"] for row in rows] == [{"peft.r": "2"}, {"peft.r": "9999"}]
    assert "peft.r: 9999 is above the smaller side" in rows[1]["error"]
    assert (Path(rows[0]["dir"]) / "adapter" / "adapter_model.safetensors").exists()
    assert (tmp_path / "sweep" / "report.html").exists()
    capsys.readouterr()
    with pytest.raises(RunError):  # the same words again: what is done is not done again
        run_sweep("sft", words, None)
    out = capsys.readouterr().out
    assert "[1/2] r=2: done already" in out and "[2/2] r=9999: started" in out


@pytest.fixture(scope="module")
def serial(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("serial") / "sweep"
    return folder, run_sweep("dpo", [*TINY, "+peft=lora", "peft.r=2,4", "peft.alpha=8,16", f"run.dir={folder}"], None)


def test_the_page_has_a_heat_map_over_both_axes(serial: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, rows = serial
    assert [row["overrides"] for row in rows] == [{"peft.r": r, "peft.alpha": alpha} for r in ("2", "4") for alpha in ("8", "16")]
    page = (folder / "report.html").read_text()
    assert '<table class="heat">' in page and page.count("--heat: ") == 4
    for row in rows:
        assert show("eval/loss", row["metrics"]["eval/loss"]) in page


@pytest.mark.parametrize("launcher", [[], ["hydra/launcher=local", "hydra.launcher.n_jobs=2"], ["hydra/launcher=submitit_local"]])
def test_every_launcher_gives_the_same_numbers(
    serial: tuple[Path, list[dict[str, Any]]], launcher: list[str], tmp_path: Path
) -> None:
    again = run_sweep("dpo", [*TINY, "+peft=lora", "peft.r=2,4", "peft.alpha=16", f"run.dir={tmp_path}/again", *launcher], None)
    expected = [row["metrics"] for row in serial[1] if row["overrides"]["peft.alpha"] == "16"]
    assert [row["metrics"] for row in again] == expected


def test_a_bad_value_stops_the_sweep_before_its_first_job(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"peft\.r: .*got 'x'"):
        run_sweep("sft", [*TINY, "+peft=lora", "peft.r=4,x", f"run.dir={tmp_path}/sweep"], None)
    assert not (tmp_path / "sweep").exists()


def processes_of(place: Path) -> list[int]:
    """Processes of this machine whose command names a path, or who work in it."""
    listed = subprocess.run(["ps", "-eo", "pid=,args="], capture_output=True, text=True, check=True).stdout
    return [int(line.split()[0]) for line in listed.splitlines() if str(place) in line and "ps -eo" not in line]


@pytest.mark.parametrize("warm", ["true", "false"])
def test_sigterm_to_a_parallel_sweep_saves_all_its_jobs_and_the_next_start_goes_on(warm: str, tmp_path: Path) -> None:
    """The sweep alone gets the signal. Jobs at work write a checkpoint; no process is left; the next start says what is what."""
    folder = tmp_path / "sweep"
    words = [*TINY, "train.max_steps=200", "+peft=lora", "peft.r=2,4,8", "hydra/launcher=local", "hydra.launcher.n_jobs=2"]
    words += [f"run.warm={warm}", f"run.dir={folder}", "train.save_steps=null", "eval.sets=null"]
    command = [*PYTHON, "-m", "posttrain", "sft", "-m", *words]
    first = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    two = [folder / "000-r=2", folder / "001-r=4"]
    deadline = time.monotonic() + 240
    while not all((each / "metrics.jsonl").exists() and (each / "metrics.jsonl").read_text().count("\n") > 2 for each in two):
        assert first.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    first.send_signal(signal.SIGTERM)
    said, _ = first.communicate(timeout=240)
    assert first.returncode == 75 and said.splitlines()[-1].startswith("stopped: the sweep was stopped by a signal"), said
    rows = json.loads((folder / "sweep.json").read_text())
    assert [row["status"] for row in rows] == ["stopped"] * 3
    assert [any((each / "checkpoints").glob("step-*")) for each in two] == [True, True] and not (folder / "002-r=8").exists()
    assert processes_of(tmp_path) == []
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert [row["status"] for row in json.loads((folder / "sweep.json").read_text())] == ["done"] * 3
    assert all("going on from step" in (each / "job.log").read_text() for each in two)
    assert again.stdout.count(": started") == 3 and "done already" not in again.stdout
    assert processes_of(tmp_path) == []
