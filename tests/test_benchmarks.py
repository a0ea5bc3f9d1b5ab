"""The GPU benchmark runs as it is, on a toy shape."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "gpu.py"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "share"),
    [
        ([], "share_of_matmul_rate"),
        (["--quant", "nf4", "--recompute", "2", "--dense", "1"], "share_of_matmul_rate"),
        (["--rollout", "--new", "6"], "floor_share"),
        (["--generate", "--new", "6"], "floor_share"),
    ],
)
def test_gpu_benchmark_on_a_toy_shape(words: list[str], share: str) -> None:
    command = [sys.executable, str(SCRIPT), "--shape", "toy", "--tokens", "128", "--documents", "2", *words]
    found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    assert found["tokens_per_second"] > 0 and 0 < found[share] < 1
