"""Every stage runs where its tensors lie on a device of their own.

The device is written in Python (tests/second_device.py) and refuses tensors that lie elsewhere, with the error that a card gives.
Kernels for CUDA alone are not part of it, nor are numbers: torch's devices in Python are experimental, and sometimes read
memory that nobody has written.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TINY = ["model=tiny", "data.max_rows=24", "train.batch_size=2", "train.max_steps=2", "data.eval_rows=4", "eval.rows=2"]
PPO = ["ppo", *TINY, "+peft=lora", "reward.function=length", "rollout.max_new_tokens=8"]
RUNS = {
    "cpt": ["cpt", *TINY, "+peft=none", "data.replay.tokens=256", "data.general.path=self"],
    "sft": ["sft", *TINY, "+peft=lora", "train.eval_steps=1", "train.keep_best=eval/loss", "eval.generate.prompts=2"],
    "ewc": ["sft", *TINY, "+peft=lora", "ewc.lambda=1.0", "curriculum.by=perplexity", "train.gradient_checkpointing=true"],
    "rm": ["rm", *TINY, "+peft=lora"],
    "dpo": ["dpo", *TINY, "+peft=lora"],
    "ppo": PPO,
    "groups": [*PPO, "ppo.samples=4", "ppo.advantage=grpo", "ppo.loss=grpo"],
}
ROOT = Path(__file__).parents[2]


def python(*words: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join([str(ROOT), str(ROOT / "src"), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, timeout=300, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_a_stage_runs_on_another_device(name: str, tmp_path: Path) -> None:
    done, place = None, tmp_path
    for attempt in range(5):
        place = tmp_path / str(attempt)
        done = python("-m", "tests.second_device", *RUNS[name], f"run.dir={place}")
        if "is not finite" not in done.stderr and "is not a number" not in done.stderr:  # of memory that nobody has written
            break
    assert done and done.returncode == 0, done
    manifest = json.loads((place / "manifest.json").read_text())
    assert manifest["device"] == "card:0" and manifest["steps"] == 2


def test_the_device_refuses_what_lies_elsewhere() -> None:
    """As a card does: a number of the CPU's beside an operation element by element is taken, in a stack it is not."""
    words = (
        "import torch; from tests.second_device import register; kept = register(); a = torch.ones(2, device='card')\n"
        "print((a + torch.tensor(2.0)).tolist(), a[torch.tensor([1])].device)\n"
        "for work in (lambda: a + torch.ones(2), lambda: torch.stack([a[0], torch.tensor(1.0)])):\n"
        "    try: work()\n"
        "    except RuntimeError as error: print(str(error)[:47])\n"
    )
    done = python("-c", words)
    assert done.stdout.splitlines() == ["[3.0, 3.0] card:0", *["Expected all tensors to be on the same device, "] * 2], (
        done.stderr
    )


def test_figures_of_two_devices_are_read_together() -> None:
    """A stage's own are on the CPU, the loss's there; PPO has both. 6 / 2 and 8 / 4."""
    words = (
        "import torch; from tests.second_device import register; kept = register()\n"
        "from posttrain.training.metrics import Averages\n"
        "for places in (('cpu', 'card'), ('card', 'cpu')):\n"
        "    found = Averages()\n"
        "    found.add({name: (torch.tensor(total).to(place), count) for name, total, count, place in\n"
        "               zip('ab', (6.0, 8.0), (2.0, torch.tensor(4.0).to(places[1])), places)})\n"
        "    print(found.read())\n"
    )
    done = python("-c", words)
    assert done.stdout.splitlines() == ["{'a': 3.0, 'b': 2.0}"] * 2, done.stderr
