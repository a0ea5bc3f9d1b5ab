"""examples/plugin, built and laid where pip would lay it: its loss, format, reward, metric and stage are used as ours."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from posttrain.config.paths import root

pytestmark = pytest.mark.slow
PLUGIN = root("configs").parent / "examples" / "plugin"
RUN = """
import json, sys
import posttrain

SMALL = ["model=tiny", "train.max_steps=2", "train.batch_size=2", "train.max_length=128", "data.eval_rows=2", "eval.sets=null"]
ROWS = ["data.path=rows.jsonl", "data.eval_share=0.2", "optim.lr=1e-9", "optim.warmup_ratio=0"]
OWN = ["eval.generate.prompts=2", "eval.generate.max_new_tokens=4", "eval.generate.metrics=[polite]"]
found = {"plain": posttrain.run("sft", *SMALL, *ROWS, *OWN, "run.dir=plain")}
found["focal"] = posttrain.run("sft", *SMALL, *ROWS, "sft.loss=focal", "run.dir=focal")
found["half"] = posttrain.run("half", *SMALL, *ROWS, "run.dir=half")
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    if not PLUGIN.exists():
        pytest.skip("runs from a checkout only")
    place = tmp_path_factory.mktemp("plugin")
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(place)], cwd=PLUGIN, check=True)
    with zipfile.ZipFile(next(place.glob("*.whl"))) as wheel:
        wheel.extractall(place / "site")
    rows = [{"asked": f"What is {i} plus 1?", "said": f"It is {i + 1}, thank you."} for i in range(30)]
    (place / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place / "site"), *sys.path])}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads((place / "found.json").read_text())


def figures(place: Path, run: str, name: str) -> list[float]:
    lines = [json.loads(line) for line in (place / run / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines if name in line]


def test_its_format_is_read_and_its_reward_is_a_metric(found: tuple[Path, dict[str, Any]]) -> None:
    _, manifests = found
    assert sum(source["rows"] for source in manifests["plain"]["data"]) > 20
    assert manifests["plain"]["metrics"]["answers/polite"] == 0.0  # the tiny model is not


def test_its_loss_and_its_stage_are_theirs(found: tuple[Path, dict[str, Any]]) -> None:
    """At a rate of nothing the same rows have the same log-probs: half of the loss, and another gradient."""
    place, manifests = found
    plain, half = figures(place, "plain", "train/loss"), figures(place, "half", "train/loss")
    assert half == pytest.approx([each / 2 for each in plain], rel=1e-4)
    assert manifests["half"]["stage"] == "half"
    plain, focal = figures(place, "plain", "train/grad_norm"), figures(place, "focal", "train/grad_norm")
    assert all(abs(one / other - 1) > 0.001 for one, other in zip(plain, focal, strict=True))
