"""The best evaluation: when a run ends for want of a better one, whose weights it leaves, and that a stop changes neither."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.test_loop import STEPS, gather_weights, make_loop
from torch import Tensor

from posttrain.errors import Stopped, UserError
from posttrain.training.best import Best, Judge
from posttrain.training.checkpoint import newest_checkpoint
from posttrain.training.loop import Loop
from posttrain.training.processes import Processes
from posttrain.training.state import TrainState

LOSSES = {1: 3.0, 2: 1.0, 3: 2.0, 4: 1.0, 5: 4.0, 6: 2.5}  # the best is that of step 2, and of equals the earlier one is


def judge(patience: int | None, keeps: bool, lower: bool = True) -> Judge:
    return Judge("eval/loss", lower, patience, keeps)


def judged(folder: Path, by: Judge, losses: dict[int, float] = LOSSES, **more: Any) -> Loop:
    """A run that goes on where `folder` has been left, and evaluates after every step."""
    loop = make_loop(folder, 4, 2, **more)
    loop.config = replace(loop.config, eval_steps=1, keep_checkpoints=1)
    loop.judge, loop.evaluate = by, lambda done: {"eval/loss": losses[done]}
    return loop


def fit(loop: Loop) -> dict[str, Tensor]:
    checkpoint, _ = newest_checkpoint(loop.checkpoints)
    if checkpoint:
        loop.state = TrainState.from_dict(checkpoint.state)
        loop.restore(checkpoint)
    loop.fit(checkpoint.step if checkpoint else 0)
    return gather_weights(loop.module)


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    """Of each step of the run without a judge."""
    loop, found = make_loop(tmp_path_factory.mktemp("plain"), 4, 2), {}
    loop.config = replace(loop.config, eval_steps=1)
    loop.evaluate = lambda done: found.update({done: gather_weights(loop.module)}) or {}
    loop.fit(0)
    return found | {STEPS: gather_weights(loop.module)}


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_better_by_hand() -> None:
    by, best = judge(2, True), None
    seen = []
    for step, value in enumerate([3.0, float("nan"), 2.0, 2.0, 5.0]):
        best = by.judged(best, step, value)
        seen.append((best["step"], best["value"], best["waited"], by.is_over(best)))
    assert seen == [(0, 3.0, 0, False), (0, 3.0, 1, False), (2, 2.0, 0, False), (2, 2.0, 1, False), (2, 2.0, 2, True)]
    higher = judge(None, True, lower=False)
    assert higher.judged(Best(step=1, value=0.5, waited=3), 2, 0.6) == {"step": 2, "value": 0.6, "waited": 0}
    assert higher.judged(Best(step=1, value=0.5, waited=3), 2, 0.4) == {"step": 1, "value": 0.5, "waited": 4}
    assert by.judged(None, 4, float("inf")) == {"step": None, "value": None, "waited": 1}


@pytest.mark.parametrize(("patience", "keeps", "ends", "result"), [(2, False, 4, 4), (None, True, 6, 2)])
def test_it_ends_and_leaves_what_it_says(
    tmp_path: Path, weights: dict[int, dict[str, Tensor]], capsys: pytest.CaptureFixture[str],
    patience: int | None, keeps: bool, ends: int, result: int,
) -> None:  # fmt: skip
    loop = judged(tmp_path, judge(patience, keeps))
    assert same(fit(loop), weights[result])
    assert loop.state.ended == {"step": ends, "back_to": result}
    steps = [update for step in range(result) for update in loop.source(step)]
    assert loop.state.seen == sum(batch.size for update in steps for batch in update.batches)
    said = " ".join(capsys.readouterr().out.split())
    assert f"the lowest eval/loss is 1, at step 2; the result has the weights of step {result}" in said
    assert (f"ended at step {ends} of 6, after {patience} evaluations" in said) == (ends < 6)


def test_stopped_and_resumed_is_the_same_end(tmp_path: Path, weights: dict[int, dict[str, Tensor]]) -> None:
    stopped_and_resumed(tmp_path, weights, 3, [3])


@pytest.mark.slow
@pytest.mark.parametrize("patience", [3, None])
def test_a_stop_after_each_step(tmp_path: Path, weights: dict[int, dict[str, Tensor]], patience: int | None) -> None:
    stopped_and_resumed(tmp_path, weights, patience, [1] * 5)


def stopped_and_resumed(tmp_path: Path, weights: dict[int, dict[str, Tensor]], patience: int | None, stops: list[int]) -> None:
    """stops: steps of each start. The best so far and what was waited are in the checkpoint."""
    for steps in stops:
        loop = judged(tmp_path, judge(patience, True))
        loop.stop_after = steps
        with pytest.raises(Stopped):
            fit(loop)
    loop = judged(tmp_path, judge(patience, True))
    assert same(fit(loop), weights[2]) and loop.state.ended == {"step": 5 if patience else 6, "back_to": 2}
    again = judged(tmp_path, judge(patience, True))  # killed before the manifest: the newest checkpoint says all
    assert same(fit(again), weights[2]) and again.state.ended == loop.state.ended and again.state.seen == loop.state.seen


def test_a_signal_before_the_deciding_evaluation(tmp_path: Path, weights: dict[int, dict[str, Tensor]]) -> None:
    loop = judged(tmp_path, judge(3, True))
    learnt, seen = loop.loss, list[int]()

    def loss(lm: Any, batch: Any) -> Any:
        seen.append(1)
        loop.stop.requested |= len(seen) == 10  # within step 5, whose evaluation ends the run
        return learnt(lm, batch)

    loop.loss = loss
    with pytest.raises(Stopped, match="after step 5 of 6"):
        fit(loop)
    again = judged(tmp_path, judge(3, True))
    assert same(fit(again), weights[2]) and again.state.ended == {"step": 5, "back_to": 2}


def test_what_was_better_before_is_said() -> None:
    said = judge(None, True).told(Best(step=2, value=1.0, waited=4), 6, 6, before=0.5)
    assert said == (
        "the lowest eval/loss is 1, at step 2 (before training it was better: 0.5); the result has the weights of step 2"
    )


def test_the_newest_and_the_best_stay(tmp_path: Path) -> None:
    fit(judged(tmp_path, judge(None, True), save_steps=1))
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000002", "step-000006"]


def test_the_last_is_the_best(tmp_path: Path, weights: dict[int, dict[str, Tensor]]) -> None:
    loop = judged(tmp_path, judge(2, True), {step: 1 / step for step in LOSSES})
    assert same(fit(loop), weights[6]) and loop.state.ended is None
    assert loop.state.best == {"step": 6, "value": 1 / 6, "waited": 0}


def test_a_best_checkpoint_that_is_damaged_ends_it(tmp_path: Path) -> None:
    loop = judged(tmp_path, judge(None, True))
    loop.stop_after = 4
    with pytest.raises(Stopped):
        fit(loop)
    (tmp_path / "checkpoints" / "step-000002" / "weights.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match=r"step-000002, whose weights are the best so far, is damaged.*train.keep_best=null"):
        fit(judged(tmp_path, judge(None, True)))


def test_weights_past_the_gate_are_no_best(tmp_path: Path, weights: dict[int, dict[str, Tensor]]) -> None:
    loop = judged(tmp_path, judge(None, True))
    loop.checkpoint_gate = lambda done: done < 2
    assert same(fit(loop), weights[1]) and loop.state.ended == {"step": 2, "back_to": 1}


def test_a_metric_that_is_not_measured() -> None:
    with pytest.raises(UserError, match=r"train.keep_best: no evaluation measures 'eval/loss'.*did you mean.*eval/los2"):
        judge(None, True).check({"eval/los2": 1.0})
    with pytest.raises(UserError, match=r"train.early_stopping.metric: no row is held out.*data.eval_rows"):
        judge(1, False).check({})


def test_rank_0_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What another process makes of the evaluation, by rounding, is not asked."""

    class Told(Processes):
        def told(self, make: Any) -> Any:
            found = make()
            return 7.0 if isinstance(found, float) else found

    monkeypatch.setattr(Loop, "processes", property(lambda loop: Told()))
    loop = judged(tmp_path, judge(None, False))
    loop._evaluate(1)
    assert loop.state.best == {"step": 1, "value": 7.0, "waited": 0}
