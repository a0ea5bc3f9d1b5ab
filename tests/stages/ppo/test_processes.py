"""PPO, GRPO and RLOO in two processes, each with half of every step's prompts, are one process."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.stages.ppo.rollout import Shares
from posttrain.training.processes import Processes
from ranks import Nursery

COMMON = (
    "model=tiny", "model.dtype=float32", "+peft=lora", "data.max_rows=12", "data.eval_rows=3", "eval.sets=null",
    "rollout.max_new_tokens=8", "reward.function=posttrain.rewards:brevity", "reward.whiten=true", "ppo.minibatches=2",
    "ppo.epochs=2", "ppo.target_kl=0.01", "train.max_steps=null", "train.epochs=1", "train.save_steps=1",
    "optim.lr=0.001", "optim.eps=1e-4",  # as a number's first gradients may be rounding alone, which Adam makes a whole step of
)  # fmt: skip
KINDS = {
    "ppo": ["train.grad_accum=2"],
    "grpo": ["train.grad_accum=2", "ppo.advantage=grpo", "ppo.samples=3", "ppo.stop_kl=0.0001", "ppo.kl_coef=0.05"],
    "dynamic": [
        "train.grad_accum=2",
        "ppo.advantage=grpo",
        "ppo.samples=3",
        "ppo.dynamic_sampling=true",
        "ppo.max_draws=3",
        "ppo.target_kl=null",
        "reward.whiten=false",
        "reward.clip=0.95",  # which makes all of a group alike now and then
    ],
    "rloo": ["train.grad_accum=2", "ppo.advantage=rloo", "ppo.samples=2"],
}
ONE, HALF = "train.batch_size=2", "train.batch_size=1"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def figures(run: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]


def weights(run: Path) -> dict[str, Any]:
    return load_file(run / "adapter" / "adapter_model.safetensors")


def assert_same(first: Path, second: Path) -> None:
    one, two = figures(first), figures(second)
    assert [line.keys() for line in one] == [line.keys() for line in two]
    for mine, its in zip(one, two, strict=True):
        assert mine == pytest.approx(its, abs=1e-6, rel=1e-5)
    a, b = weights(first), weights(second)
    assert a.keys() == b.keys() and max(float((a[name] - b[name]).abs().max()) for name in a) < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_are_one(nursery: Nursery, kind: str, tmp_path: Path) -> None:
    """Nine prompts, four a step: in the last one the second process has none."""
    asked = [*COMMON, *KINDS[kind]]
    assert nursery.run(compose_run("ppo", [*asked, ONE]), tmp_path / "one").codes == [0]
    two = nursery.run(compose_run("ppo", [*asked, HALF]), tmp_path / "two", 2)
    assert two.codes == [0, 0], two.said
    assert len(figures(tmp_path / "two")) == 5  # before, three steps, after
    assert_same(tmp_path / "one", tmp_path / "two")


@pytest.mark.slow
def test_stopped_and_started_again(nursery: Nursery, tmp_path: Path) -> None:
    asked = compose_run("ppo", [*COMMON, *KINDS["ppo"], HALF, "peft.dropout=0.1"])
    assert nursery.run(asked, tmp_path / "straight", 2).codes == [0, 0]
    stopped = {**asked, "run": {**asked["run"], "stop_after": 1}}
    assert nursery.run(stopped, tmp_path / "stopped", 2).codes == [75, 75]
    assert nursery.run(asked, tmp_path / "stopped", 2).codes == [0, 0]
    assert figures(tmp_path / "stopped") == figures(tmp_path / "straight")
    mine, its = weights(tmp_path / "stopped"), weights(tmp_path / "straight")
    assert all(bool((mine[name] == its[name]).all()) for name in its)


@pytest.mark.slow
def test_torchrun(nursery: Nursery, tmp_path: Path) -> None:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "posttrain"]
    words = ["ppo", *COMMON, *KINDS["grpo"], "train.max_steps=1", HALF, f"run.dir={tmp_path / 'two'}"]
    ended = subprocess.run([*torchrun, *words], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert json.loads((tmp_path / "two" / "manifest.json").read_text())["processes"] == 2


def test_micro_batches_are_dealt_with_their_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five micro-batches for two processes: the second has one that is empty. Each knows where its prompts stand among all."""
    units = [[7, 3], [1], [4], [9, 2], [5]]
    first, second = (Shares(units, Processes(2, rank)) for rank in range(2))
    assert first.mine == [0, 2, 4] and second.mine == [1, 3, 5]
    assert [second.of(number) for number in second.mine] == [[1], [9, 2], []]
    assert [first.place(number) for number in first.mine] == [0, 3, 6] and second.place(3) == 4
    found = {0: ["a", "c", "e"], 1: ["b", "d"]}
    known = [dict(zip([0, 2, 4], found[0], strict=True)), dict(zip([1, 3], found[1], strict=True))]
    monkeypatch.setattr(Processes, "gathered", lambda self, mine: known)
    assert first.together(found[0]) == second.together(found[1]) == ["a", "b", "c", "d", "e"]


def test_what_ppo_does_not_share_is_refused() -> None:
    with pytest.raises(UserError, match=r"train.fsdp: ppo does not shard its roles"):
        compose_run("ppo", [*COMMON, "train.fsdp=true"])
    with pytest.raises(UserError, match=r"train.processes: with vllm ppo runs in one process"):
        compose_run("ppo", [*COMMON, "train.processes=2", "rollout.engine=vllm"])
