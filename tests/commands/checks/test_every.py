"""The checks of `doctor --gpu`: what a CPU can do here, all of them where there is a card; and that a wrong one is seen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.devices.graphs import stand_in
from torch import Tensor

from posttrain.commands.checks import every, kernels, rates, runs
from posttrain.commands.checks.check import Check, Figures, NotHere, Wrong, numbers, run_check, within
from posttrain.commands.checks.every import CHECKS, check_device
from posttrain.commands.checks.kernels import rms_norm
from posttrain.commands.checks.runs import KILL_CHECK
from posttrain.errors import RunError, UserError
from posttrain.launch import warm_worker
from posttrain.models.kernels import fused
from posttrain.models.kernels.beside import compared
from posttrain.models.language import replayed

CPU = torch.device("cpu")
LONG = ("attention: documents", "attention: dense", "a training step", "a short sft, memory and plan")
# kills and two processes on a CPU: tests/stages/test_interruptions.py, test_distributed.py
ON_A_CPU = [check for check in CHECKS if not check.cards and (not check.slow or check.name in LONG)]


@pytest.mark.parametrize(
    "check",
    [pytest.param(each, marks=pytest.mark.slow if each.name in LONG else (), id=each.name) for each in ON_A_CPU],
)
def test_what_a_cpu_can_do_is_right_here(check: Check) -> None:
    found = run_check(check, CPU, 0)
    assert found.outcome == "ok" and found.figures, f"{found.says}\n{found.trace}"


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_all_of_it_is_right_on_this_card(check: Check) -> None:
    found = run_check(check, torch.device("cuda"), torch.cuda.device_count())
    assert found.outcome != "wrong", f"{found.says}\n{found.trace}"


def test_what_needs_a_card_says_so_on_a_cpu() -> None:
    needing = [check for check in CHECKS if check.cards]
    assert {each.name for each in needing} == {"attention: varlen", "attention: flex", "RoPE", "liger-kernel", "a rollout"}
    assert {run_check(each, CPU, 0).says for each in needing} == {"needs CUDA"}
    two = run_check(replace(needing[0], cards=2), CPU, 1)
    assert (two.outcome, two.says) == ("not here", "needs 2 CUDA cards")


def test_an_error_is_relative_and_has_the_gradients() -> None:
    """2 % more in the values alone, and then in the gradient alone."""

    class Off(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: object, *grads: Tensor) -> Tensor:
            return 1.02 * grads[0]

    given = numbers((4, 5))
    assert compared(lambda x: x * 1, lambda x: x * 1, given) == 0
    assert compared(lambda x: x + 0.02 * x.detach(), lambda x: x * 1, given) == pytest.approx(0.02, rel=1e-4)
    assert compared(Off.apply, lambda x: x * 1, given) == pytest.approx(0.02, rel=1e-4)
    assert compared(lambda x: x * torch.nan, lambda x: x * 1, given) == float("inf")


def test_without_a_compiler_rope_is_not_here_and_a_kernel_that_fails_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    check = next(each for each in CHECKS if each.name == "RoPE")
    for why, outcome in {
        "Triton and a C compiler are not here": "not here",
        "Triton's RoPE does not run here (X)": "wrong",
    }.items():
        monkeypatch.setattr(kernels, "obstacle_of_triton", lambda _, why=why: why)
        assert (found := run_check(check, CPU, 1)).outcome == outcome and found.says == why


def test_answers_by_a_recorded_step_are_timed_or_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a stand-in for CUDA's graphs; and where a recording fails."""
    monkeypatch.setattr(replayed, "records", lambda _: True)
    monkeypatch.setattr(rates, "NEW", 4)
    made, check = stand_in(monkeypatch), next(each for each in CHECKS if each.name == "a rollout")
    found = run_check(check, CPU, 1)
    assert found.outcome == "ok" and min(found.figures.values()) > 0 and len(found.figures) == 2 and len(made) == 4, found.trace
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: (_ for _ in ()).throw(RuntimeError("no graphs")))
    wrong = run_check(check, CPU, 1)
    assert wrong.outcome == "wrong" and "CUDA graph of a token of 1 LlamaForCausalLM" in wrong.says and "no graphs" in wrong.says


def test_errors_that_are_too_large_are_named() -> None:
    with pytest.raises(Wrong, match=r"^relative error above 1e-02: b 2.0e-02, c nan$"):
        within({"a": 0.001, "b": 0.02, "c": float("nan")}, 1e-2)


def test_a_kernel_that_computes_something_else_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    own = fused.RMSNorm.forward
    monkeypatch.setattr(fused.RMSNorm, "forward", staticmethod(lambda ctx, x, weight, eps: 1.05 * own(ctx, x, weight, eps)))
    with pytest.raises(Wrong, match="relative error above"):
        rms_norm(CPU)


def made_up(*outcomes: str) -> tuple[Check, ...]:
    """Checks that end so."""

    def work(device: torch.device, how: str) -> Figures:
        if how == "ok":
            return {"GB/s": 12.5}
        raise {"wrong": Wrong("it is 3"), "not here": NotHere("no tool"), "fails": RuntimeError("a driver\nsaid so")}[how]

    return tuple(Check(how, lambda device, how=how: work(device, how)) for how in outcomes)


def test_what_is_wrong_ends_with_an_error_and_its_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(RunError, match=r"^wrong here: wrong, fails; --json FILE writes"):
        check_device(tmp_path / "report.json", made_up("ok", "wrong", "not here", "fails"))
    report = json.loads((tmp_path / "report.json").read_text())
    found = {each["name"]: (each["outcome"], each["says"]) for each in report["checks"]}
    assert found == {
        "ok": ("ok", ""), "wrong": ("wrong", "it is 3"), "not here": ("not here", "no tool"),
        "fails": ("wrong", "fails: a driver"),
    }  # fmt: skip
    assert report["checks"][0]["figures"] == {"GB/s": 12.5} and "driver" in report["checks"][3]["trace"]
    assert report["device"] == "cpu" and {"torch", "bitsandbytes"} <= set(report["libraries"]) and report["cards"] == []
    assert "not here: no tool" in " ".join(capsys.readouterr().out.split())


def test_a_stop_takes_no_figures_with_it(tmp_path: Path) -> None:
    """The report is there from the first check on, with the one that is at work: as a kill would leave it, and as Ctrl-C does."""
    report, seen = tmp_path / "report.json", list[dict[str, Any]]()

    def hangs(device: torch.device) -> Figures:
        seen.append(json.loads(report.read_text()))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        check_device(report, (*made_up("ok", "wrong"), Check("hangs", hangs), *made_up("not here")))
    for found in (*seen, json.loads(report.read_text())):
        assert found["at work"] == "hangs" and found["device"] == "cpu"
        assert [each["outcome"] for each in found["checks"]] == ["ok", "wrong"]
    check_device(report, made_up("ok"))
    assert json.loads(report.read_text())["at work"] is None


def test_the_kill_comes_before_what_takes_long() -> None:
    names = [check.name for check in CHECKS]
    assert names.index("kill -9 and resume") < min(names.index(name) for name in ("NF4", "a short sft, memory and plan"))


@pytest.mark.slow
def test_a_kill_and_resume_take_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three runs are forked from one process that has the libraries."""
    begun, own = list[dict[str, str]](), warm_worker.WarmWorker.__init__

    def count(self: warm_worker.WarmWorker, environment: dict[str, str]) -> None:
        begun.append(environment)
        own(self, environment)

    monkeypatch.setattr(warm_worker.WarmWorker, "__init__", count)
    monkeypatch.setattr(runs, "worker_command", lambda _: ["false"])
    try:
        found = run_check(KILL_CHECK, CPU, 0)
    finally:
        warm_worker.close()
    assert found.outcome == "ok" and found.figures["killed after step"] > 0, f"{found.says}\n{found.trace}"
    assert len(begun) == 1


@pytest.mark.parametrize(("script", "says"), [("exit 3", "exit code 3: said so"), ("exit 0", "came to its end before")])
def test_a_run_that_ends_before_its_kill_is_wrong(
    script: str, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(warm_worker, "_are_gone", True)
    monkeypatch.setattr(runs, "worker_command", lambda _: ["sh", "-c", f"echo said so; {script}"])
    with pytest.raises(Wrong, match=says):
        runs._worker({"run": {"dir": str(tmp_path / "run")}}, kill_at=tmp_path / "checkpoints")


def test_where_all_is_well_nothing_is_raised(tmp_path: Path) -> None:
    assert [each.outcome for each in check_device(None, made_up("ok", "not here"))] == ["ok", "not here"]
    with pytest.raises(UserError, match="--json: there is no directory"):
        every.check_device(tmp_path / "no" / "report.json", made_up("ok"))
