"""A PEFT method of another package: one file and its YAML, and every command knows it, or refuses it by name."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

METHOD = """
from typing import Any, Literal

from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Adapted


class Toy(Adapted):
    saves = AdapterKind("ia3", "IA3")
    own_parts = ("ia3_",)
    method: Literal["toy"]
    targets: list[str]

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import IA3Config

        return IA3Config(target_modules=self.targets, feedforward_modules=[], task_type=task)


METHOD = Toy
"""
YAML = "method: toy\ntargets: [q_proj, o_proj]\ndtype: float32\nlr_factor: 10.0\n"
TRAIN = """
import json, sys
import posttrain
from posttrain.commands.merge import merge_run
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose_run
from posttrain.errors import UserError

words = ["model=tiny", "peft=toy", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=4"]
words += ["eval.sets=null", "optim.lr=0.05"]
manifest = posttrain.run("sft", *words, "run.dir=run")


def said(call):
    try:
        call()
    except UserError as error:
        return str(error)


found = {
    "trained": manifest["trainable"]["trained"],
    "before": manifest["metrics"]["eval/loss_before"],
    "after": manifest["metrics"]["eval/loss"],
    "planned": make_plan("sft", [*words, "model.dtype=float32"])["memory"]["adapters"],
    "merge": said(lambda: merge_run(__import__("pathlib").Path("run"), __import__("pathlib").Path("out"), 1.0)),
    "nf4": said(lambda: compose_run("sft", [*words, "quant=nf4"])),
    "ppo": said(lambda: compose_run("ppo", ["model=tiny", "peft=toy", "reward.function=posttrain.rewards:brevity"])),
    "fsdp": said(lambda: compose_run("sft", [*words, "train.fsdp=true"])),
    "chain": said(lambda: posttrain.run("sft", *words, "init=run", "peft=lora", "run.dir=child")),
    "near": said(lambda: compose_run("sft", ["peft=toyy"])),
}
json.dump(found, open("found.json", "w"))
"""


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A directory with an installed package that adds the method `toy`."""
    (tmp_path / "toy_method" / "configs" / "peft").mkdir(parents=True)
    (tmp_path / "toy_method" / "__init__.py").touch()
    (tmp_path / "toy_method" / "ia3.py").write_text(METHOD)
    (tmp_path / "toy_method" / "configs" / "peft" / "toy.yaml").write_text(YAML)
    info = tmp_path / "toy_method-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-method\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.peft_methods]\ntoy = toy_method.ia3\n")
    return tmp_path


def python(package: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(package), *sys.path])
    return subprocess.run(
        [sys.executable, *arguments], cwd=package, env={**os.environ, "PYTHONPATH": paths}, capture_output=True, text=True
    )


def test_a_method_of_another_package_trains_and_is_refused_where_it_is_not_known_to_work(package: Path) -> None:
    done = python(package, "-c", TRAIN)
    assert done.returncode == 0, done.stderr
    found = json.loads((package / "found.json").read_text())
    config = json.loads((package / "run" / "adapter" / "adapter_config.json").read_text())
    assert config["peft_type"] == "IA3"
    model = json.loads((Path(config["base_model_name_or_path"]) / "config.json").read_text())
    width = model["hidden_size"]
    assert found["trained"] == model["num_hidden_layers"] * 2 * width  # a factor for each output of both matrices
    assert found["planned"] == 4 * found["trained"]
    assert found["after"] < found["before"]
    assert found["merge"].startswith("run: its adapter cannot be merged (how to merge it is not known)")
    assert found["nf4"] == "quant=nf4 cannot be trained by toy; add +peft=qlora, or say quant=none"
    assert found["ppo"].startswith("peft: ppo cannot train toy")
    assert found["fsdp"].startswith("train.fsdp does not shard peft=toy")
    assert found["chain"].startswith("init: its adapter cannot be merged (how to merge it is not known)")
    assert found["near"].startswith("peft: there is no 'toyy' - did you mean 'toy'?")


def test_a_broken_package_is_one_line(package: Path) -> None:
    (package / "toy_method" / "ia3.py").write_text("import nothing_of_that_name")
    done = python(package, "-m", "posttrain", "sft", "model=tiny", "--cfg", "job")
    assert done.returncode == 2
    assert (
        "peft method 'toy': toy_method.ia3 cannot be used (No module named 'nothing_of_that_name')" in done.stderr + done.stdout
    )
    assert "Traceback" not in done.stderr


def test_looking_at_configs_needs_neither_torch_nor_peft() -> None:
    looks = "import sys, posttrain.config.schema; print({'torch', 'peft', 'transformers', 'bitsandbytes'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", looks], capture_output=True, text=True).stdout == "set()\n"
