"""A signal in every phase of a run: nothing is lost, and what goes on is the run that was asked for."""

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.errors import Stopped
from posttrain.runs.files import sha256
from posttrain.training.signals import SIGNALS, StopSignal, caught, say_at_once

SIZE = ("model=tiny", "+peft=lora", "peft.r=4", "train.max_steps=3", "train.batch_size=2", "data.max_rows=30", "eval.rows=1")
STAGES = {
    "sft": ("data.eval_rows=2",),
    "ppo": ("data.eval_rows=2", "rollout.max_new_tokens=4", "reward.function=posttrain.rewards:brevity", "train.grad_accum=2",
            "ppo.minibatches=1"),
}  # fmt: skip


@pytest.fixture(autouse=True)
def as_in_a_terminal() -> Iterator[None]:
    """A shell starts its background jobs with SIGINT ignored, and this may be one."""
    before = {each: signal.signal(each, signal.SIG_DFL) for each in SIGNALS}
    yield
    for each, handler in before.items():
        signal.signal(each, handler)


def strike(monkeypatch: pytest.MonkeyPatch, place: str, time: int, number: signal.Signals) -> None:
    """The signal comes as the function at `place` is called for the time-th time."""
    module, _, name = place.rpartition(".")
    import importlib

    function: Callable[..., Any] = getattr(importlib.import_module(module), name)
    calls = list[int]()

    def struck(*args: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) == time:
            os.kill(os.getpid(), number)
        return function(*args, **options)

    monkeypatch.setattr(place, struck)


PHASES = {
    "reading": ("sft", "posttrain.stages.language.prepare.read_mixture", 1, "between steps"),
    "loading": ("sft", "posttrain.stages.language.build.load_causal", 1, "between steps"),
    "measuring before": ("sft", "posttrain.stages.language.training.own_metrics", 1, "between steps"),
    "measuring after": ("sft", "posttrain.stages.language.training.own_metrics", 2, "between steps"),
    "a step": ("sft", "posttrain.training.guarding.check_update", 2, "after step 2 of 3, saved"),
    "answering before": ("ppo", "posttrain.stages.ppo.stage.sample", 1, "between steps"),
    "a rollout": ("ppo", "posttrain.stages.ppo.stage.sample", 3, "after step 1 of 3, saved"),
}


@pytest.mark.parametrize(
    "phase", [pytest.param(p, marks=pytest.mark.slow) if p in ("a rollout", "reading") else p for p in PHASES]
)
def test_a_signal_is_obeyed_and_the_run_goes_on(phase: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, place, time, words = PHASES[phase]
    number = SIGNALS[len(phase) % 5]
    settings = [stage, *SIZE, *STAGES[stage]]
    before = {each: signal.getsignal(each) for each in SIGNALS}
    with monkeypatch.context() as patch:
        strike(patch, place, time, number)
        with pytest.raises(Stopped, match=words):
            posttrain.run(*settings, f"run.dir={tmp_path / 'stopped'}")
    assert {each: signal.getsignal(each) for each in before} == before  # handlers are put back
    posttrain.run(*settings, f"run.dir={tmp_path / 'stopped'}")
    posttrain.run(*settings, f"run.dir={tmp_path / 'straight'}")
    files = [tmp_path / run / "adapter" / "adapter_model.safetensors" for run in ("stopped", "straight")]
    assert sha256(files[0]) == sha256(files[1])


def test_which_signals_stop_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """A closed terminal and submitit's own are among them; what is ignored from the start, as by nohup, stays ignored."""
    assert [each.name for each in caught()] == ["SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP"]
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        assert signal.SIGHUP not in caught()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_answered_at_once(capfd: pytest.CaptureFixture[str]) -> None:
    """Within a long step too: the line is there before the step ends, once, and in the process that prints alone."""
    stop = StopSignal()
    try:
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)  # Ctrl-C that a launcher hands on as well
        assert stop.requested
        assert capfd.readouterr().err == (
            "stopping: what is begun is finished and saved first; Ctrl-C again ends at once, without it\n"
        )
    finally:
        stop.restore()


def test_other_ranks_leave_the_word_to_the_first(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    say_at_once("stopping")
    assert capfd.readouterr().err == ""
