"""Successive halving: which settings are tried, which go on, and that who goes on is the run that never stopped."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch import tune as tuning
from posttrain.launch.proposals import Optuna, Proposer, proposer, settings, space_of
from posttrain.launch.tune import tune

WORDS = ["model=tiny", "train.max_steps=18", "data.max_rows=30", "data.eval_rows=4", "train.batch_size=2", "train.grad_accum=1"]


def test_settings_by_hand() -> None:
    assert settings(["optim.lr=1e-5..1e-3"], 5) == [
        [f"optim.lr={lr}"] for lr in ("1e-05", "3.16e-05", "0.0001", "0.000316", "0.001")
    ]
    assert settings(["optim.lr=1e-4..1e-2", "peft.r=8,16"], 6) == [
        [f"optim.lr={lr}", f"peft.r={r}"] for lr in ("0.0001", "0.001", "0.01") for r in (8, 16)
    ]
    assert settings(["peft.r=4..64"], 3) == [["peft.r=4"], ["peft.r=16"], ["peft.r=64"]]
    assert len(settings(["a=1e-3..1", "b=1e-3..1"], 9)) == 9


@pytest.mark.parametrize(
    ("over", "trials", "match"),
    [
        (["optim.lr"], 9, "--over: 'optim.lr' is none"),
        (["optim.lr=1e-3..1e-5"], 9, "does not rise"),
        (["optim.lr=0..1"], 9, "does not rise"),
        (["optim.lr=a..b"], 9, "ends that are no numbers"),
        (["optim.lr=1e-5..1e-3", "peft.r=1,2,3,4,5,6"], 9, "--trials: 9 .* give 12 or more"),
        (["optim.lr=1e-4"], 9, "one setting"),
        (["optim.lr=1e-4..1e-2", "optim.lr=1e-3,1e-2"], 9, "--over: optim.lr is given twice"),
    ],
)
def test_what_is_no_range_is_refused(over: list[str], trials: int, match: str) -> None:
    with pytest.raises(UserError, match=match):
        settings(over, trials)


def scored(asked: Proposer) -> list[tuple[float, int]]:
    """All settings of a proposer that is told (log10 lr + 3)^2, least at 1e-3; r 8 is worse than 16, and very small ones fail."""
    found: list[tuple[float, int]] = []
    scores: list[float] = []
    while wave := asked.wave(scores):
        assert [asked.wave(scores), asked.wave(scores)] == [wave, wave], "a start from the middle proposes the same"
        for lr, r in wave:
            found.append((float(lr.removeprefix("optim.lr=")), int(r.removeprefix("peft.r="))))
            distance = (math.log10(found[-1][0]) + 3) ** 2 + 0.1 * (found[-1][1] == 8)
            scores.append(math.inf if found[-1][0] < 3e-6 else distance)
    return found


BOTH = ["optim.lr=1e-6..1e-1", "peft.r=8,16"]


def test_at_random_in_the_range() -> None:
    found = scored(proposer("random", BOTH, 40))
    logs = [math.log10(lr) for lr, _ in found]
    assert len(found) == 40 and all(-6 <= each <= -1 for each in logs) and {r for _, r in found} == {8, 16}
    assert sum(each < -3.5 for each in logs) in range(12, 29), "evenly in the logarithm"
    assert found == scored(proposer("random", BOTH, 40)) and found[:12] == scored(proposer("random", BOTH, 12))


def test_what_auto_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert proposer("auto", BOTH[:1], 9).line == "a grid of 9" and proposer("auto", BOTH[1:], 9).line == "a grid of 2"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert proposer("auto", BOTH, 9).line.startswith("9 at random, as Optuna is not installed (pip install 'posttrain[tune]')")
    with pytest.raises(UserError, match=r"--sampler: tpe is Optuna's, which is not installed; pip install 'posttrain\[tune\]'"):
        proposer("tpe", BOTH, 9)
    with pytest.raises(UserError, match="--sampler: there is no 'tpee'"):
        proposer("tpee", BOTH, 9)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: object())
    assert proposer("auto", BOTH, 9).line == "9 by Optuna's TPESampler, in 3 waves"


@pytest.mark.slow
def test_optunas_samplers_learn_from_the_first_judgement() -> None:
    """Over eight seeds the last wave of TPE is nearer to the best rate than its first, which is at random."""
    pytest.importorskip("optuna")
    space = space_of(BOTH)
    every = {name: [scored(Optuna(name, space, 18, seed)) for seed in range(8)] for name in ("tpe", "qmc")}
    assert all(len(found) == 18 and all(1e-6 <= lr <= 1e-1 for lr, _ in found) for each in every.values() for found in each)
    away = [[abs(math.log10(lr) + 3) for lr, _ in found] for found in every["tpe"]]
    assert sum(sum(each[12:]) for each in away) < 0.8 * sum(sum(each[:6]) for each in away)


# losses by learning rate and step: the best at the end is the fourth after 2 steps, but falls fastest there; and one fails
LOSSES: dict[str, dict[int, float]] = {
    "1e-3": {1: 4.6, 2: 4.2, 6: 3.0, 18: 2.0}, "2e-3": {1: 3.95, 2: 3.9, 6: 3.1}, "3e-3": {1: 4.05, 2: 4.0},
    "5e-3": {1: 4.1, 2: 4.05}, "1e-2": {},
}  # fmt: skip
OVER = ["optim.lr=" + ",".join(LOSSES)]


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Jobs that have the losses of LOSSES, of which the second start is stopped after one; what is started, each time."""
    started: list[list[str]] = []

    def launch(stage: str, words: list[str], config_dir: Any, place: Path, jobs: list[dict[str, Any]]) -> bool:
        started.append([job["overrides"]["optim.lr"] for job in jobs])
        stopped = len(started) == 2
        for job in jobs[: 1 if stopped else None]:
            directory = Path(job["dir"])
            directory.mkdir(exist_ok=True)
            config = yaml.safe_load(directory.with_suffix(".yaml").read_text())
            assert config["train"]["max_steps"] == 18 and config["train"]["eval_steps"] == 1  # of the full length
            assert config["run"]["stop_after"] == {2: 2, 6: 6, 18: None}[job["rung"]]  # from 0, as there is no checkpoint
            before = {2: 0, 6: 2, 18: 6}[job["rung"]]
            with (directory / "metrics.jsonl").open("a") as file:
                for step, loss in LOSSES[job["overrides"]["optim.lr"]].items():
                    if before < step <= job["rung"]:
                        file.write(json.dumps({"step": step, "eval/loss": loss}) + "\n")
        return stopped

    monkeypatch.setattr(tuning, "launch_jobs", launch)
    return started


def test_the_choice_on_a_made_up_table(made_up: list[list[str]], tmp_path: Path) -> None:
    words = [*WORDS, f"run.dir={tmp_path}"]
    with pytest.raises(Stopped, match="the same command goes on"):
        tune("sft", words, OVER, 9, 3, "eval/loss", False)
    found = tune("sft", words, OVER, 9, 3, "eval/loss", False)
    # what has been at its step is not begun again; what has failed is tried again, as in a sweep
    assert made_up == [list(LOSSES), ["2e-3", "1e-3"], ["1e-2"], ["1e-3"], ["1e-3"]]
    assert found["overrides"] == {"optim.lr": "1e-3"} and found["rungs"] == [2, 6, 18]
    assert found["steps"] == 3 * 2 + 6 + 18
    assert found["command"] == f"posttrain sft {' '.join(WORDS)} optim.lr=1e-3"
    assert [row["status"] for row in found["trials"]] == ["done", "out at step 6", "out at step 2", "out at step 2", "failed"]
    assert (tmp_path / "report.html").exists()
    with pytest.raises(UserError, match="is of another tune"):
        tune("sft", [*words, "train.seed=1"], ["optim.lr=1e-4,1e-3"], 9, 2, "eval/loss", False)


def test_where_all_fail(made_up: list[list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_advance", lambda *_: None)
    with pytest.raises(RunError, match="no trial has eval/loss at step 10; see"):
        tune("sft", [*WORDS, f"run.dir={tmp_path}"], ["optim.lr=1e-3,1e-2"], 9, 2, "eval/loss", False)


def test_a_metric_that_no_trial_has_is_told_beside_those_that_they_have(made_up: list[list[str]], tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"no trial has eval/perplexity at step 2, which have eval/loss; see"):
        tune("sft", [*WORDS, f"run.dir={tmp_path}"], OVER, 9, 3, "eval/perplexity", False)


def test_the_best_command_has_each_key_once(made_up: list[list[str]], tmp_path: Path) -> None:
    words = [*WORDS, "optim.lr=1e-6", f"run.dir={tmp_path}"]
    with pytest.raises(Stopped):
        tune("sft", words, OVER, 9, 3, "eval/loss", False)
    assert tune("sft", words, OVER, 9, 3, "eval/loss", False)["command"] == f"posttrain sft {' '.join(WORDS)} optim.lr=1e-3"


def test_what_tune_cannot_know(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train.max_steps: tune has to know"):
        tune("sft", ["model=tiny"], ["optim.lr=1e-4..1e-2"], 9, 3, "eval/loss", False)
    with pytest.raises(UserError, match=r"train.eval_steps=3: tune says itself"):
        tune("sft", [*WORDS, "train.eval_steps=3"], ["optim.lr=1e-4..1e-2"], 9, 3, "eval/loss", False)


@pytest.mark.slow
def test_who_goes_on_has_the_bits_of_a_run_without_a_stop(tmp_path: Path) -> None:
    import posttrain
    from posttrain.commands.compare_runs import compare_runs

    words = [*WORDS, "+peft=lora", "eval.rows=4"]
    over = ["optim.lr=1e-3,1e-2", "peft.r=2,4"]
    found = tune("sft", [*words, f"run.dir={tmp_path / 'tune'}"], over, 9, 3, "eval/loss", False)
    assert found["rungs"] == [2, 6, 18] and found["steps"] == 2 * 2 + 6 + 18
    chosen = [f"{key}={value}" for key, value in found["overrides"].items()]
    posttrain.run("sft", *words, *chosen, "train.eval_steps=1", f"run.dir={tmp_path / 'straight'}")
    compared = compare_runs(tmp_path / "straight", Path(found["dir"]))
    assert compared and all(each.same for each in compared), compared
    (best,) = (row for row in found["trials"] if row["status"] == "done")
    assert best["scores"][-1] == json.loads((tmp_path / "straight" / "manifest.json").read_text())["metrics"]["eval/loss"]
    began = (tmp_path / "tune" / "tune.json").stat().st_mtime_ns
    assert tune("sft", [*words, f"run.dir={tmp_path / 'tune'}"], over, 9, 3, "eval/loss", False)["best"] == found["best"]
    assert (tmp_path / "tune" / "tune.json").stat().st_mtime_ns >= began
