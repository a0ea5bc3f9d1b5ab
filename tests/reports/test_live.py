"""The page of a run that goes on: there from the first step, cheap, harmless, and true at every end."""

import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.reports.test_run_page import make_run

import posttrain
from posttrain.errors import RunError, Stopped, UserError
from posttrain.reports import live
from posttrain.reports.live import LivePage, told_of
from posttrain.reports.run_page import run_page
from posttrain.runs.files import sha256
from posttrain.runs.status import Status, read_status, standing, write_status

REFRESH = '<noscript><meta http-equiv="refresh" content="10"></noscript>'


class Clock:
    """Time that passes when it is told to."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(live.time, "monotonic", lambda: self.now)


def test_it_takes_a_hundredth_of_the_time_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that take 0.5 s each, beside steps of 0.1 s: over ten minutes no more than 6 s and the first page."""
    clock, spent = Clock(monkeypatch), list[float]()

    def write(directory: Path) -> None:
        clock.now += 0.5
        spent.append(0.5)

    page = LivePage(tmp_path, write)
    began = clock.now
    while clock.now - began < 600:
        clock.now += 0.1
        page.log()
    assert 0.5 * 11 <= sum(spent) <= 6 + 0.5


def test_a_cheap_one_is_written_every_ten_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock, times = Clock(monkeypatch), list[float]()
    page = LivePage(tmp_path, lambda directory: times.append(clock.now))
    for _ in range(61):
        page.log()
        clock.now += 0.5
    assert times == [100.0, 110.0, 120.0, 130.0]


def test_one_that_cannot_be_written_ends_nothing_and_is_said_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)

    def write(directory: Path) -> None:
        raise OSError(28, "No space left on device")

    page = LivePage(tmp_path, write)
    for _ in range(3):
        page.log()
        clock.now += 60
    assert capsys.readouterr().out.count("cannot be written ([Errno 28] No space left on device); the run goes on") == 1


def test_a_run_that_goes_on_says_its_step_and_the_time_that_is_left(tmp_path: Path) -> None:
    """60 s for 3 of 9 steps: 2 minutes for the others."""
    lines = [{"step": 0, "eval/loss": 2.0}, *({"step": i, "train/loss": 2.0 / i, "tokens": 9} for i in (1, 2, 3))]
    run = make_run(tmp_path / "a", finished=False, lines=lines)
    LivePage.begun(run, 9, 0)
    status = read_status(run)
    assert status and (status.steps, status.start) == (9, 0)
    write_status(run, replace(status, began=time.time() - 60))
    text = run_page(run).read_text()
    assert '<span class="chip running">running</span>' in text and REFRESH in text
    assert "Running when this was written, at 20" in text
    assert re.search(r'class="what">step</div>\s*<div class="value">3</div>\s*<div class="more ">of 9<', text)
    left = re.search(r'class="what">time left</div>\s*<div class="value">(\d):(\d\d)<', text)
    assert left and 118 <= 60 * int(left[1]) + int(left[2]) <= 124
    every = re.search(r'data-every="(\d+)"', text)
    assert every and 19 <= int(every[1]) <= 22, "a step takes 20 s: silence begins after several of them"


@pytest.mark.parametrize(
    ("error", "state", "why"),
    [
        (Stopped("stopped by a signal after step 3 of 9, saved"), "stopped", "stopped by a signal after step 3 of 9, saved"),
        (RunError("the disk is full"), "failed", "the disk is full"),
        (UserError("data.path: no such file"), "failed", "data.path: no such file"),
        (ZeroDivisionError("division by zero"), "failed", "ZeroDivisionError: division by zero"),
        (KeyboardInterrupt(), "stopped", ""),
    ],
)
def test_an_end_before_the_end_is_on_the_page(tmp_path: Path, error: BaseException, state: str, why: str) -> None:
    run = make_run(tmp_path / "a", finished=False)

    def train() -> None:
        with told_of(run):
            assert standing(run).state == "running"
            LivePage.begun(run, 4, 0)
            assert REFRESH in (run / "report.html").read_text()
            raise error

    with pytest.raises(type(error)):
        train()
    text = (run / "report.html").read_text()
    assert standing(run).state == state and f'<span class="chip {state}">{state}</span>' in text and why in text
    assert REFRESH not in text and 'data-written="' not in text


def test_a_run_that_never_trained_leaves_no_page(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", finished=False)
    with pytest.raises(UserError), told_of(run):
        raise UserError("no")
    assert not (run / "report.html").exists() and standing(run).state == "failed"


def test_of_several_processes_one_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    with told_of(tmp_path):
        assert list(tmp_path.iterdir()) == []


def test_a_page_of_a_killed_run_says_so_when_it_is_made_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a", finished=False)
    mine = Status.of_this_process()
    write_status(run, replace(mine, born=mine.born - 60))
    text = run_page(run).read_text()
    assert '<span class="chip stopped">' in text and "its process is gone" in text and REFRESH not in text


def test_a_finished_run_is_not_looked_at_again(tmp_path: Path) -> None:
    run = make_run(tmp_path / "a")
    assert 'http-equiv="refresh"' not in run_page(run).read_text()
    assert json.loads((run / "manifest.json").read_text())["steps"] == 4


@pytest.mark.slow
def test_a_run_with_a_page_at_every_step_is_the_run_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit. From its first step on the page is there, and says that the run goes on."""
    words = (
        "model=tiny",
        "+peft=lora",
        "train.max_steps=3",
        "train.batch_size=2",
        "data.max_rows=20",
        "data.eval_rows=2",
        "eval.rows=1",
    )
    monkeypatch.setattr(live, "EVERY", 0.0)
    monkeypatch.setattr(live, "SHARE", 1e9)
    shown = list[str]()

    def look(step: int, values: dict[str, float]) -> None:
        page = tmp_path / "with" / "report.html"
        shown.append("running" if page.exists() and 'class="chip running"' in page.read_text() else "none")

    posttrain.run("sft", *words, f"run.dir={tmp_path / 'with'}", callbacks=[look])
    assert shown == ["none", "running", "running", "running", "running"], (
        "before it, three steps, and what is measured at the end"
    )
    assert 'class="chip done"' in (tmp_path / "with" / "report.html").read_text()
    assert not (tmp_path / "with" / "status.json").exists()
    monkeypatch.setattr(LivePage, "_write", lambda page, status=None: None)
    posttrain.run("sft", *words, f"run.dir={tmp_path / 'without'}")
    one, other = (sha256(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in ("with", "without"))
    assert one == other
