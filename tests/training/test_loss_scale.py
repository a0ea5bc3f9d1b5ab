"""Scaled losses: the same steps to the last bit while nothing overflows, half the scale where something does, and resume."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from posttrain.batch import LossOutput
from posttrain.config.compose import compose_run
from posttrain.errors import RunError
from posttrain.launch.worker import run_config
from posttrain.losses.ewc import fisher_diagonal
from posttrain.training.checkpoint import newest_checkpoint
from posttrain.training.loop import Loop
from posttrain.training.loop_parts import LoopConfig
from posttrain.training.loss_scale import FIRST, GROWS_AFTER, begin, gradients_by, overflowed, scaled_gradients, unscale
from posttrain.training.objective import Update
from posttrain.training.optimizer import make_optimizer
from posttrain.training.signals import StopSignal
from posttrain.training.state import TrainState
from posttrain.training.tracking import Tracker

STEPS = 5


def test_the_scale_is_halved_where_it_overflows_and_doubled_after_long() -> None:
    state = TrainState()
    assert not overflowed(state, 1.0, math.inf)  # nothing is scaled: another fault
    begin(state)
    assert state.loss_scale == 65536 and overflowed(state, 1.0, math.inf) and overflowed(state, 1.0, math.nan)
    assert (state.loss_scale, state.scale_held) == (16384, 0)
    assert not overflowed(state, math.nan, math.nan) and state.loss_scale == 16384  # the forward's fault, not the scale's
    assert [overflowed(state, 1.0, 1.0) for _ in range(GROWS_AFTER - 1)] == [False] * (GROWS_AFTER - 1)
    begin(state)  # as after a restart
    assert (state.loss_scale, state.scale_held) == (16384, GROWS_AFTER - 1)
    assert not overflowed(state, 1.0, 1.0) and (state.loss_scale, state.scale_held) == (32768, 0)
    state.loss_scale = 2.0**-14
    assert not overflowed(state, 1.0, math.inf)  # no scale helps


def test_unscaling_is_exact() -> None:
    state, gradient = TrainState(loss_scale=4096.0), torch.randn(50)
    found = gradient * 4096
    unscale([found, None], state)
    assert torch.equal(found, gradient)


@dataclass(frozen=True)
class Numbers:
    """Inputs of a batch; a step's has its number."""

    x: Tensor
    loss_denominator: float = 4.0
    size: int = 4
    rows: tuple[int, ...] = (1, 2)

    def to(self, device: Any) -> Numbers:
        return self

    def split(self) -> tuple[Numbers, ...]:
        return (self,)


def make(folder: Path, scale: float | None, worst: float = 1.0, stop_after: int | None = None) -> Loop[Any]:
    """worst: what the loss of step 2 is multiplied by in float16."""
    torch.manual_seed(0)
    module, accelerator = nn.Linear(3, 1), Accelerator(cpu=True)
    optimizer, _ = make_optimizer(
        "adamw", module, lambda name: 1.0, lr=0.1, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.0
    )  # fmt: skip

    def loss(lm: nn.Module, batch: Any) -> LossOutput:
        out = lm(batch.x).half() * (worst if float(batch.x[0, 0]) == 2 else 1.0)
        return LossOutput(out.float().sum(), {})

    def source(step: int) -> list[Update[Any]]:
        x = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
        x[0, 0] = step
        return [Update([Numbers(x)])]

    folder.mkdir(exist_ok=True)
    config = LoopConfig(STEPS, 0, 1, None, 1, 2, 0.1, "constant", 1.0, seed=1)
    return Loop(
        "test", accelerator, module, optimizer, loss, source, config, Tracker(folder / "metrics.jsonl", accelerator),
        folder / "checkpoints", StopSignal(), lambda done: {}, stop_after=stop_after, state=TrainState(loss_scale=scale),
    )  # fmt: skip


def weights(loop: Loop[Any], start: int = 0) -> Tensor:
    loop.fit(start)
    return torch.cat([p.detach().flatten() for p in loop.module.parameters()])


def test_a_scale_that_overflows_nothing_changes_no_bit(tmp_path: Path) -> None:
    scaled, plain = make(tmp_path / "a", 256.0), make(tmp_path / "b", None)
    assert torch.equal(weights(scaled), weights(plain))
    assert (scaled.state.loss_scale, scaled.state.scale_held, scaled.state.left_out) == (256.0, STEPS, [])


def test_an_overflow_leaves_one_update_out_and_a_stop_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Step 3's gradients, 2 * FIRST / 4 and more in float16, are infinite at first; its moments stay as they were."""
    whole = make(tmp_path / "a", FIRST, worst=8.0)
    found = weights(whole)
    assert [(e["step"], e["why"], e["rows"]) for e in whole.state.left_out] == [(3, "a gradient is beyond float16", ["1", "2"])]
    assert (whole.state.loss_scale, whole.state.scale_held) == (FIRST / 2, STEPS - 3)
    assert "losses are multiplied by 32768 from here on" in " ".join(capsys.readouterr().out.split())
    steps = [int(state["step"]) for state in whole.optimizer.state.values()]
    assert steps == [STEPS - 1] * 2
    halfway = make(tmp_path / "b", FIRST, worst=8.0, stop_after=3)
    with pytest.raises(BaseException, match=r"stopped as run.stop_after says after step 3"):
        halfway.fit(0)
    checkpoint, _ = newest_checkpoint(tmp_path / "b" / "checkpoints")
    assert checkpoint
    again = make(tmp_path / "b", None, worst=8.0)
    again.state = TrainState.from_dict(checkpoint.state)
    again.restore(checkpoint)
    assert torch.equal(weights(again, 3), found)
    assert (again.state.loss_scale, again.state.scale_held) == (FIRST / 2, STEPS - 3)


def test_a_model_beyond_float16_is_said(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"step 3: .*numbers of the model itself may be beyond float16.*say model.dtype=float32"):
        make(tmp_path, FIRST, worst=1e6).fit(0)


def test_fisher_by_way_of_float16_is_that_of_float32() -> None:
    """Gradients of 3e-9 to each other sample's 3: the first are zero in float16, where 6e-8 is the least, and at the scale that
    they need the others overflow. By hand: mean of g^2, of g = 3e-9 x and 3 x in turn."""
    x, state = torch.tensor([1.0, -2.0, 0.5]), TrainState()
    for factors in ((3e-9,), (3e-9, 3.0, 3e-9)):
        w = torch.ones(3, requires_grad=True)

        def likelihoods(w: Tensor = w, factors: tuple[float, ...] = factors) -> Any:
            for factor in factors:
                yield ((w * x).half().float() * factor).sum()

        exact = sum(factor**2 for factor in factors) / len(factors) * x**2
        (found,) = fisher_diagonal(likelihoods(), [w], partial(scaled_gradients, state=state))
        torch.testing.assert_close(found, exact, rtol=2e-3, atol=0)
        assert state.loss_scale == (FIRST if len(factors) == 1 else FIRST / 4)  # 3 * 65,536 is beyond 65,504, half of it too
    (lost,) = fisher_diagonal([((w * x).half().float() * 3e-9).sum()], [w], gradients_by("bfloat16"))
    assert not lost.any()
    (kept,) = fisher_diagonal([((w * x).half().float() * 3e-9).sum()], [w], gradients_by("float16"))
    torch.testing.assert_close(kept, 9e-18 * x**2, rtol=2e-3, atol=0)


def test_gradients_that_no_scale_makes_finite_are_said() -> None:
    w = torch.ones(2, requires_grad=True)
    with pytest.raises(RunError, match=r"^a gradient is beyond float16, whatever it is multiplied by.*say model.dtype=float32"):
        scaled_gradients((w.half().float() * 1e12).sum(), [w], TrainState())


@pytest.mark.slow
def test_a_run_in_float16_scales_its_losses(tmp_path: Path) -> None:
    words = [
        "+peft=lora",
        "model=tiny",
        "model.dtype=float16",
        "train.max_steps=2",
        "data.max_rows=20",
        f"run.dir={tmp_path}/run",
    ]
    manifest = run_config(compose_run("sft", words))
    checkpoint, _ = newest_checkpoint(tmp_path / "run" / "checkpoints")
    assert checkpoint and (checkpoint.state["loss_scale"], checkpoint.state["scale_held"]) == (FIRST, 2)
    assert manifest["batches_left_out"] == []
