"""Two gloo processes, each with half of every batch, are one process, whether each has all weights or a part of them."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from posttrain.config.compose import compose_run
from posttrain.models.builtin import builtin_directory
from ranks import Nursery

pytestmark = pytest.mark.slow
COMMON = ["model=tiny", "train.max_steps=4", "eval.rows=2", "data.max_rows=60", "data.eval_rows=4"]
MODULE = [sys.executable, "-m", "posttrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "posttrain"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "posttrain"]
ONE, HALF, SHARDED = "train.batch_size=2", "train.batch_size=1", "train.fsdp=true"


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery() as found:
        yield found


def run(nursery: Nursery, stage: str, directory: Path, *words: str, processes: int = 1) -> Path:
    ended = nursery.run(compose_run(stage, [*COMMON, *words]), directory, processes)
    assert ended.codes == [0] * processes, ended.said
    assert ("sharded over 2 processes" in ended.said[0]) == (SHARDED in words)
    return directory


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def result(directory: Path) -> dict[str, Any]:
    return load_file(next(p for kind in ("adapter", "model") for p in (directory / kind).glob("*.safetensors")))


def assert_same(first: Path, second: Path) -> None:
    assert losses(first) == pytest.approx(losses(second), abs=1e-6)
    one, two = result(first), result(second)
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-6


@pytest.fixture(scope="module")
def parent(nursery: Nursery, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(nursery, "sft", tmp_path_factory.mktemp("parent") / "sft", "+peft=lora", ONE)


@pytest.mark.parametrize(
    ("command", "words"),
    [(MODULE, ["train.processes=2", HALF]), (TORCHRUN, [HALF, SHARDED]), (ACCELERATE, [ONE])],
    ids=["processes", "torchrun", "accelerate"],
)
def test_every_launcher(parent: Path, tmp_path: Path, command: list[str], words: list[str]) -> None:
    two = tmp_path / "two"
    asked = [*command, "sft", *COMMON, "+peft=lora", *words, f"run.dir={two}"]
    ended = subprocess.run(asked, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert ended.returncode == 0, ended.stderr
    assert_same(parent, two)
    processes = 1 if command is ACCELERATE else 2
    assert json.loads((two / "manifest.json").read_text())["processes"] == processes


def test_full_training_sharded(nursery: Nursery, tmp_path: Path) -> None:
    """Of a base in 16 bits, which is made float32 a layer at a time where it is sharded."""
    shutil.copytree(builtin_directory("tiny")[0], tmp_path / "base")
    for file in (tmp_path / "base").glob("*.safetensors"):
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, metadata={"format": "pt"})
    words = [f"model.name={tmp_path}/base", "model.dtype=float32"]
    one = run(nursery, "cpt", tmp_path / "one", ONE, *words)
    two = run(nursery, "cpt", tmp_path / "two", HALF, SHARDED, *words, processes=2)
    assert_same(one, two)
    assert {value.dtype for value in result(two).values()} == {torch.float32}


@pytest.mark.parametrize("init", ["eva", "corda"])
def test_first_values_from_rows(nursery: Nursery, init: str, tmp_path: Path) -> None:
    """Every process begins with the same ones, which one process has too: ranks, and a base without them."""
    words = ["+peft=lora", "peft.r=4", f"peft.init={init}", "peft.init_rows=8"]
    one = run(nursery, "sft", tmp_path / "one", "train.batch_size=4", *words)
    assert_same(one, run(nursery, "sft", tmp_path / "two", "train.batch_size=4", "train.grad_accum=1", *words, processes=2))


def test_dpo_on_an_adapter_sharded(nursery: Nursery, parent: Path, tmp_path: Path) -> None:
    """The frozen adapter underneath is sharded too, and the last step leaves one process without a pair of its own."""
    words = ["+peft=lora", f"init={parent}", "data.max_rows=9", "data.eval_rows=1", "train.max_steps=null", "train.epochs=1"]
    one = run(nursery, "dpo", tmp_path / "one", ONE, *words)
    two = run(nursery, "dpo", tmp_path / "two", HALF, SHARDED, *words, processes=2)
    first = json.loads((two / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/margin"] == 0.0
    assert_same(one, two)


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_pairs_of_ragged_weights(nursery: Nursery, stage: str, tmp_path: Path) -> None:
    """Nine pairs: in the last step one process has none of its own."""
    rows = [
        {"prompt": f"{k} is", "chosen": f" {k * k}" * (1 + k % 3), "rejected": " no", "weight": [0.1, 5, 1][k % 3]}
        for k in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["+peft=lora", f"data.path={tmp_path}/rows.jsonl", "data.eval_share=0", "train.max_steps=null", "train.epochs=1"]
    one = run(nursery, stage, tmp_path / "one", ONE, *words)
    assert_same(one, run(nursery, stage, tmp_path / "two", HALF, *words, processes=2))


@pytest.mark.parametrize("loss", ["kto", "bco", "aot"])
def test_losses_that_look_at_the_whole_step(nursery: Nursery, loss: str, tmp_path: Path) -> None:
    """Nine pairs, of KTO and BCO eighteen answers: in the last step one process may have none of its own."""
    rows = [{"prompt": f"{k} is", "chosen": f" {k * k}" * (1 + k % 3), "rejected": " no"} for k in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["+peft=lora", f"data.path={tmp_path}/rows.jsonl", "data.eval_share=0", "train.max_steps=null", "train.epochs=1"]
    words += [f"dpo.loss={loss}", "optim.lr=5e-4", "train.grad_accum=2"]
    one = run(nursery, "dpo", tmp_path / "one", ONE, *words)
    assert_same(one, run(nursery, "dpo", tmp_path / "two", HALF, *words, processes=2))
