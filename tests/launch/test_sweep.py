"""Sweeps of real, tiny runs: a failing job does not take the others along, the same seed gives the same numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import RunError, UserError
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
