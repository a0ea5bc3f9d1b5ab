"""A stage of another package: a folder with a SPEC, its config, its steps and its YAML, and every command knows it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

SPEC = """
from posttrain.data.row_use import RowUse
from posttrain.stages.spec import OF_ALL, OF_LANGUAGE, StageSpec

SPEC = StageSpec(
    name="toy",
    position=99,
    about="Half of supervised fine-tuning.",
    examples=("model=tiny",),
    settings=OF_LANGUAGE + OF_ALL,
    config="toy_stage.config:Toy",
    steps="toy_stage.steps:steps",
    rows=RowUse("toy", ("messages",), "conversations", "messages"),
)
"""
CONFIG = """
from posttrain.config.fields import Rate, Strict
from posttrain.config.schema import Guarded


class ToyConfig(Strict):
    scale: Rate


class Toy(Guarded):
    toy: ToyConfig
"""
STEPS = """
from dataclasses import replace

from posttrain.data.collate import pack
from posttrain.losses.tokens import token_loss
from posttrain.stages.language.stage import LanguageSteps
from posttrain.training.objective import Objective


def steps(cfg):
    def loss(module, batch):
        output = token_loss(module(batch), batch.weight)
        total, count = output.metrics["loss"]
        scaled = {**output.metrics, "loss": (cfg.toy.scale * total, count)}
        return replace(output, total=cfg.toy.scale * output.total, metrics=scaled)

    return LanguageSteps(Objective(pack, loss))
"""
YAML = """
defaults:
  - stage/guarded
  - model: smollm2
  - data: python_questions
  - optim: adamw
  - train: default
  - quant: none
  - peft: none
  - _self_
  - experiment: none

stage: toy
init: null
chain: {mode: auto}
full_lr: 2.0e-5
tracker: none
run: {dir: null}
eval: {rows: 4, max_length: 64, sets: null}
toy: {scale: 0.5}
"""
RECIPE = """
name: both
description: a stage of ours, then one of another package
overrides: [model=tiny, train.max_steps=1, train.batch_size=2, data.max_rows=20, data.eval_rows=2, eval.sets=null, +peft=lora]
steps:
  sft:
  toy:
"""
RUN = """
import json
from pathlib import Path

from typer.testing import CliRunner

from posttrain.cli import app

SMALL = ["model=tiny", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=2", "eval.sets=null"]
SMALL += ["+peft=lora", "peft.r=4", "train.max_length=128"]
found = {}


def invoke(name, *words):
    result = CliRunner().invoke(app, list(words), env={"COLUMNS": "150", "TERM": "dumb"})
    found[name] = {"code": result.exit_code, "output": result.output, "stdout": result.stdout}


invoke("help", "--help")
invoke("toy help", "toy", "--help")
invoke("typo", "toy", *SMALL, "toy.scal=1")
invoke("pairs", "toy", *SMALL, "data.path=builtin:preferences")
invoke("train", "toy", *SMALL, "run.dir=toy")
invoke("sft", "sft", *SMALL, "run.dir=sft")
invoke("preview", "preview", "toy", *SMALL, "--page", "page.html")
invoke("plan", "plan", "toy", *SMALL, "--json", "--memory", "8GB")
invoke("eval", "eval", "toy", "--json")
invoke("recipe", "run", "recipe.yaml", "run.dir=both")
Path("found.json").write_text(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """What every command said of a stage that an installed package adds."""
    place = tmp_path_factory.mktemp("package")
    (place / "toy_stage" / "configs").mkdir(parents=True)
    for name, text in {"__init__.py": SPEC, "config.py": CONFIG, "steps.py": STEPS, "configs/toy.yaml": YAML}.items():
        (place / "toy_stage" / name).write_text(text)
    info = place / "toy_stage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toy-stage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[posttrain.stages]\ntoy = toy_stage\n")
    (place / "recipe.yaml").write_text(RECIPE)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(place), *sys.path])}
    done = subprocess.run([sys.executable, "-c", RUN], cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return place, json.loads((place / "found.json").read_text())


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def test_it_trains_by_its_own_loss(found: tuple[Path, dict[str, Any]]) -> None:
    """Half the loss of sft on the same first batch: same rows, same start, same random numbers."""
    place, said = found
    assert said["train"]["code"] == 0, said["train"]["output"]
    toy, sft = lines(place / "toy"), lines(place / "sft")
    assert toy[1]["train/loss"] == pytest.approx(sft[1]["train/loss"] / 2, rel=1e-6)
    assert json.loads((place / "toy" / "manifest.json").read_text())["stage"] == "toy"


def test_help_names_it(found: tuple[Path, dict[str, Any]]) -> None:
    _, said = found
    assert "Half of supervised fine-tuning." in said["help"]["output"]
    assert "posttrain toy model=tiny" in said["toy help"]["output"]


def test_its_config_and_its_rows_are_checked(found: tuple[Path, dict[str, Any]]) -> None:
    _, said = found
    assert said["typo"]["code"] == 2 and "did you mean 'toy.scale'?" in said["typo"]["output"]
    assert said["pairs"]["code"] == 2 and "toy does not take pairs" in said["pairs"]["output"]


def test_preview_plan_and_eval_know_it(found: tuple[Path, dict[str, Any]]) -> None:
    place, said = found
    assert [said[name]["code"] for name in ("preview", "plan", "eval")] == [0, 0, 0], said
    assert "conversation 1" in said["preview"]["output"] and (place / "page.html").exists()
    plan = json.loads(said["plan"]["stdout"])
    manifest = json.loads((place / "toy" / "manifest.json").read_text())
    assert plan["trained_parameters"] == manifest["trainable"]["trained"] and plan["steps"] == 2
    measured = json.loads(said["eval"]["stdout"])["toy"]["eval/loss"]  # the likelihood, whatever the stage's own loss
    assert measured == pytest.approx(manifest["metrics"]["eval/loss"] * 2, rel=1e-5)


def test_it_is_a_step_of_a_recipe(found: tuple[Path, dict[str, Any]]) -> None:
    place, said = found
    assert said["recipe"]["code"] == 0, said["recipe"]["output"]
    manifest = json.loads((place / "both" / "2-toy" / "manifest.json").read_text())
    assert [parent["role"] for parent in manifest["parents"]] == ["init"] and manifest["chain"] == "stack"
