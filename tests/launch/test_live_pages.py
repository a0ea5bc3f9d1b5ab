"""The pages of sweeps and recipes while they go on: there at once, true, live until the end."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.reports.test_run_page import make_run

from posttrain.errors import RunError, Stopped
from posttrain.launch import recipe_runner, sweep
from posttrain.launch.job_rows import row_so_far
from posttrain.reports import live
from posttrain.reports.live import KeptLive
from posttrain.runs.status import Status, ended, write_status

REFRESH = '<meta http-equiv="refresh" content="10">'


@pytest.fixture(autouse=True)
def often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(live, "EVERY", 0.05)
    monkeypatch.setattr(live, "SHARE", 1.0)


def wait_for(page: Path, is_so: Callable[[str], bool]) -> str:
    for _ in range(400):
        text = page.read_text() if page.exists() else ""
        if is_so(text):
            return text
        time.sleep(0.05)
    raise AssertionError(page.read_text() if page.exists() else "no page")


@pytest.mark.parametrize(("error", "state"), [(None, None), (Stopped("a signal"), "stopped"), (RunError("broken"), "failed")])
def test_it_is_written_until_the_end_and_then_says_how_that_was(tmp_path: Path, error: Exception | None, state: Any) -> None:
    written: list[str | None] = []
    try:
        with KeptLive(tmp_path / "report.html", lambda state, every: written.append(state), "sweep"):
            while len(written) < 3:
                time.sleep(0.01)
            if error:
                raise error
    except (Stopped, RunError):
        assert error
    assert written[:3] == ["running"] * 3 and written[-1] == state


def test_what_goes_wrong_with_it_is_said_once_and_ends_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tries: list[None] = []

    def write(state: str | None, every: float) -> None:
        tries.append(None)
        raise OSError("the disk is full")

    with KeptLive(tmp_path / "report.html", write, "sweep"):
        while len(tries) < 4:
            time.sleep(0.01)
    told = capsys.readouterr()
    assert (told.out + told.err).count("the disk is full") == 1


def test_a_sweeps_page_follows_its_jobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One of three jobs is done, one at work, one has not begun: no best yet, though the done one has the lowest loss so far."""
    seen: list[str] = []

    def launch(stage: str, overrides: Any, config_dir: Any, place: Path, jobs: list[dict[str, Any]]) -> bool:
        make_run(Path(jobs[0]["dir"]), metrics={"eval/loss": 1.25, "eval/loss_before": 2.0})
        make_run(Path(jobs[1]["dir"]), finished=False, lines=[{"step": 0, "eval/loss": 2.0}, {"step": 2, "eval/loss": 1.75}])
        write_status(Path(jobs[1]["dir"]), Status.of_this_process())
        seen.append(wait_for(place / "report.html", lambda text: "1.7500" in text and "1.2500" in text))
        ended(Path(jobs[1]["dir"]), "stopped", "by a signal")
        return True

    monkeypatch.setattr(sweep, "launch_jobs", launch)
    with pytest.raises(Stopped):
        sweep.run_sweep("sft", ["model=tiny", "optim.lr=0.1,0.2,0.3", f"run.dir={tmp_path}/sweep"], None)
    (text,) = seen
    assert REFRESH in text and '<span class="chip running">running</span>' in text and "to do" in text
    assert 'class="n top"' not in text and "Not held against each other" not in text
    after = (tmp_path / "sweep" / "report.html").read_text()
    assert REFRESH not in after and '<span class="chip stopped">stopped</span>' in after


def test_a_trial_that_has_come_to_its_rung_waits(tmp_path: Path) -> None:
    make_run(tmp_path / "a", finished=False)
    write_status(tmp_path / "a", Status.of_this_process())
    ended(tmp_path / "a", "stopped", "stopped as run.stop_after says after step 2 of 8, saved")
    row = row_so_far({"overrides": {}, "dir": str(tmp_path / "a")})
    assert (row["status"], row["metrics"]) == ("waits", None)


def test_a_recipes_page_follows_the_step_at_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "two.yaml").write_text("name: two\ndescription: Two steps.\nsteps:\n  cpt: {stage: cpt}\n  sft: {stage: sft}\n")
    monkeypatch.chdir(tmp_path)
    seen: list[str] = []

    def work(each: recipe_runner.Planned) -> None:
        metrics = {"eval/loss": 1.25, "eval/loss_before": 2.0}
        lines = [{"step": i, "tokens": i, "train/loss": 2.0 / i} for i in (1, 2, 3)]
        make_run(each.dir, stage=each.step.stage, metrics=metrics, lines=lines, finished=each.step.name == "cpt")
        if each.step.name == "sft":
            write_status(each.dir, Status.of_this_process())
            page = each.dir.parent / "report.html"
            seen.append(wait_for(page, lambda text: "Training loss, sft" in text or text.count("<figure") == 2))
            raise Stopped("in step sft")

    monkeypatch.setattr(recipe_runner, "_run_child", work)
    with pytest.raises(Stopped):
        recipe_runner.run_recipe(str(tmp_path / "two.yaml"), ["model=tiny"], from_step=None, fresh=False)
    assert REFRESH in seen[0] and "after cpt" in seen[0]
    (page,) = tmp_path.glob("runs/recipes/*/report.html")
    assert REFRESH not in page.read_text()
