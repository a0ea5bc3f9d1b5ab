"""Two gloo processes, each with half of every batch, are one process: the same losses and weights to 1e-5."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

pytestmark = pytest.mark.slow
COMMON = ["model=tiny", "train.max_steps=4", "eval.rows=2", "data.max_rows=60", "data.eval_rows=4"]
MODULE = [sys.executable, "-m", "posttrain"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "posttrain"]
ACCELERATE = [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "posttrain"]
ONE, HALF = "train.batch_size=2", "train.batch_size=1"


def run(command: list[str], stage: str, directory: Path, *words: str) -> Path:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(
        [*command, stage, *COMMON, *words, f"run.dir={directory}"], capture_output=True, text=True, env=environment
    )
    assert ended.returncode == 0, ended.stderr
    return directory


def losses(directory: Path) -> list[float]:
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    return [line["train/loss"] for line in lines if "train/loss" in line]


def result(directory: Path) -> dict[str, Any]:
    return load_file(next(p for kind in ("adapter", "model") for p in (directory / kind).glob("*.safetensors")))


def assert_same(first: Path, second: Path) -> None:
    assert losses(first) == pytest.approx(losses(second), abs=1e-5)
    one, two = result(first), result(second)
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 1e-5


@pytest.fixture(scope="module")
def parent(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(MODULE, "sft", tmp_path_factory.mktemp("parent") / "sft", "+peft=lora", ONE)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (MODULE, ["train.processes=2", HALF]),
        (MODULE, ["train.processes=2", HALF, "train.fsdp=true"]),
        (TORCHRUN, [HALF]),
        (ACCELERATE, [ONE]),
    ],
    ids=["processes", "fsdp", "torchrun", "accelerate"],
)
def test_sft(parent: Path, tmp_path: Path, command: list[str], words: list[str]) -> None:
    two = run(command, "sft", tmp_path / "two", "+peft=lora", *words)
    assert_same(parent, two)
    processes = 1 if command is ACCELERATE else 2
    assert json.loads((two / "manifest.json").read_text())["processes"] == processes


def test_full_training_sharded(tmp_path: Path) -> None:
    one = run(MODULE, "cpt", tmp_path / "one", ONE)
    assert_same(one, run(MODULE, "cpt", tmp_path / "two", HALF, "train.processes=2", "train.fsdp=true"))


def test_dpo_on_an_adapter_sharded(parent: Path, tmp_path: Path) -> None:
    """The frozen adapter underneath is sharded too, and the last step leaves one process without a pair of its own."""
    words = ["+peft=lora", f"init={parent}", "data.max_rows=9", "data.eval_rows=1", "train.max_steps=null", "train.epochs=1"]
    one = run(MODULE, "dpo", tmp_path / "one", ONE, *words)
    two = run(MODULE, "dpo", tmp_path / "two", HALF, "train.processes=2", "train.fsdp=true", *words)
    first = json.loads((two / "metrics.jsonl").read_text().splitlines()[1])
    assert first["train/margin"] == 0.0
    assert_same(one, two)


@pytest.mark.parametrize("stage", ["dpo", "rm"])
def test_pairs_of_ragged_weights(stage: str, tmp_path: Path) -> None:
    """Nine pairs: in the last step one process has none of its own."""
    rows = [
        {"prompt": f"{k} is", "chosen": f" {k * k}" * (1 + k % 3), "rejected": " no", "weight": [0.1, 5, 1][k % 3]}
        for k in range(9)
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["+peft=lora", f"data.path={tmp_path}/rows.jsonl", "data.eval_share=0", "train.max_steps=null", "train.epochs=1"]
    one = run(MODULE, stage, tmp_path / "one", ONE, *words)
    assert_same(one, run(MODULE, stage, tmp_path / "two", HALF, "train.processes=2", *words))


def test_a_quantized_base_is_not_sharded(tmp_path: Path) -> None:
    words = [*MODULE, "sft", "model=tiny", "+peft=qlora", "train.fsdp=true", f"run.dir={tmp_path}/a"]
    ended = subprocess.run(words, capture_output=True, text=True)
    assert ended.returncode == 2 and "train.fsdp does not shard a base in nf4" in ended.stderr
