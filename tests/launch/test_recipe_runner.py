"""Recipes with a worker that trains nothing: what is run, skipped, resumed, done again, and what is said about it."""

from __future__ import annotations

import copy
import functools
import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import yaml

import posttrain.config.compose
import posttrain.launch.subprocess_runner
from posttrain.config.paths import root
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.recipe import load_recipe, recipe_names
from posttrain.launch.recipe_runner import run_recipe
from posttrain.stages.spec import stages

RECIPE = """
name: small
description: two stages
overrides: [model=tiny]
steps:
  cpt:
  sft:
    overrides: [train.max_steps=7]
"""

# Writes what a run leaves; its weights follow from its config and its input. WORKER_EXIT="sft 2": how a stage ends.
WORKER = """
import hashlib, json, os, signal, sys, time, yaml
from pathlib import Path
from posttrain.stages.spec import stages
from posttrain.runs.identity import digest
config = yaml.safe_load(Path(sys.argv[1]).read_text())
run = Path(config["run"]["dir"])
(run / "adapter").mkdir(parents=True, exist_ok=True)
(run / "config.yaml").write_text(yaml.safe_dump(config))
with (run.parent / "started.txt").open("a") as f:
    f.write(run.name + chr(10))
stage, _, code = os.environ.get("WORKER_EXIT", "").partition(" ")
if stage == config["stage"]:
    if code == "wait":
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
        (run.parent / "waiting").touch()
        time.sleep(30)
    if code == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    sys.exit(int(code))
parent = (Path(config["init"]) / "adapter" / "weights").read_text() if config["init"] else ""
weights = hashlib.sha256((parent + digest({**config, "init": ""})).encode()).hexdigest()
(run / "adapter" / "weights").write_text(weights)
before, after = (2.0, 1.5) if stage == "cpt" else (1.5, 1.0)
metrics = {"eval/loss": after, "eval/loss_before": before, "general/loss": 3.0, "general/loss_before": 3.0}
manifest = {
    "stage": config["stage"], "parents": [], "base": {"name": "tiny"},
    "weights": {"kind": "adapter", "path": "adapter"},
    "files": {"adapter/weights": weights}, "config_digest": digest(config), "metrics": metrics,
    "steps": 7, "tokens": 70, "seconds": 1.0,
}
(run / "manifest.json").write_text(json.dumps(manifest))
"""


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "worker.py").write_text(WORKER)
    monkeypatch.setattr(
        posttrain.launch.subprocess_runner, "worker_command", lambda file: [sys.executable, str(tmp_path / "worker.py"), file]
    )
    monkeypatch.setattr(posttrain.config.compose, "compose", _compose)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
    return tmp_path / "small.yaml"


@functools.cache
def _composed(stage, words):
    return _real_compose(stage, list(words))


def _compose(stage, words, config_dir=None):
    return copy.deepcopy(_composed(stage, tuple(words)))


_real_compose = posttrain.config.compose.compose
HOME = Path("runs/recipes/small")


def run(recipe, *overrides, **options):
    return run_recipe(str(recipe), list(overrides), **({"from_step": None, "fresh": False} | options))


def started():
    """Steps whose worker was started since the last call."""
    log = HOME / "started.txt"
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


def test_steps_run_in_order_and_each_starts_from_the_one_before(recipe):
    entries = run(recipe, "train.seed=5")
    assert started() == ["1-cpt", "2-sft"]
    assert [e["status"] for e in entries] == ["done", "done"]
    cpt, sft = (yaml.safe_load((HOME / d / "config.yaml").read_text()) for d in ("1-cpt", "2-sft"))
    assert (cpt["init"], sft["init"]) == (None, str(HOME / "1-cpt"))
    assert (cpt["train"]["seed"], sft["train"]["seed"]) == (5, 5)
    assert (cpt["train"]["max_steps"], sft["train"]["max_steps"]) == (None, 7)
    assert "after sft" in (HOME / "report.html").read_text()


def test_a_second_time_nothing_runs_and_it_says_why(recipe, capsys):
    run(recipe)
    started()
    entries = run(recipe)
    assert started() == []
    assert [e["status"] for e in entries] == ["skipped", "skipped"]
    assert "cpt: done already (same config, data and input), skipped" in capsys.readouterr().out


def test_a_changed_setting_redoes_its_step_alone_and_keeps_the_old_one(recipe, capsys):
    run(recipe)
    started()
    old = (HOME / "2-sft/adapter/weights").read_text()
    run(recipe, "sft.optim.lr=1e-4")
    assert started() == ["2-sft"]
    assert "sft: redone, optim.lr 2e-05 -> 0.0001" in capsys.readouterr().out
    kept = list(HOME.glob("2-sft.old-*"))
    assert [p.joinpath("adapter/weights").read_text() for p in kept] == [old]
    assert (HOME / "2-sft/adapter/weights").read_text() != old


def test_a_changed_input_redoes_what_follows(recipe, capsys):
    run(recipe)
    started()
    run(recipe, "cpt.train.max_steps=3")
    assert started() == ["1-cpt", "2-sft"]
    out = capsys.readouterr().out
    assert "cpt: redone, train.max_steps null -> 3" in out
    assert "sft: redone, its input cpt changed" in out


def test_a_changed_data_file_redoes_its_step(recipe, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": "one"}\n')
    run(recipe, f"sft.data.path={rows}")
    started()
    run(recipe, f"sft.data.path={rows}")
    assert started() == []
    rows.write_text('{"text": "two"}\n')
    run(recipe, f"sft.data.path={rows}")
    assert started() == ["2-sft"]
    assert f"sft: redone, {rows} changed" in capsys.readouterr().out


def test_what_cannot_change_the_result_redoes_nothing(recipe):
    run(recipe)
    started()
    run(recipe, "tracker=tensorboard")
    assert started() == []


def test_lost_weights_are_noticed(recipe, capsys):
    run(recipe)
    started()
    (HOME / "1-cpt/adapter/weights").unlink()
    run(recipe)
    assert started() == ["1-cpt"]  # the same weights came out again, so sft still stands
    assert "cpt: redone, its adapter/weights is missing" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"from_step": "sft"}, ["2-sft"]),
        ({"from_step": "cpt"}, ["1-cpt", "2-sft"]),
        ({"fresh": True}, ["1-cpt", "2-sft"]),
    ],
)
def test_from_and_fresh_redo_even_what_stands(recipe, options, expected):
    run(recipe)
    started()
    run(recipe, **options)
    assert started() == expected
    assert sorted(p.name.split(".")[0] for p in HOME.glob("*.old-*")) == expected


@pytest.mark.parametrize(("code", "error"), [("75", Stopped), ("2", UserError), ("1", RunError), ("kill", RunError)])
def test_the_steps_exit_is_the_recipes_and_the_same_command_goes_on(recipe, monkeypatch, capsys, code, error):
    monkeypatch.setenv("WORKER_EXIT", f"sft {code}")
    with pytest.raises(error, match="step sft"):
        run(recipe)
    assert started() == ["1-cpt", "2-sft"]
    assert (HOME / "report.html").exists()
    monkeypatch.delenv("WORKER_EXIT")
    run(recipe)
    assert started() == ["2-sft"]
    assert "sft: goes on where it stopped" in capsys.readouterr().out
    assert not list(HOME.glob("*.old-*"))


def test_an_unfinished_step_of_another_config_is_moved_aside(recipe, monkeypatch):
    monkeypatch.setenv("WORKER_EXIT", "sft 75")
    with pytest.raises(Stopped):
        run(recipe)
    monkeypatch.delenv("WORKER_EXIT")
    run(recipe, "sft.train.max_steps=9")
    assert len(list(HOME.glob("2-sft.old-*"))) == 1
    assert yaml.safe_load((HOME / "2-sft/config.yaml").read_text())["train"]["max_steps"] == 9


def test_a_signal_reaches_the_step_and_stops_the_recipe(recipe, monkeypatch):
    monkeypatch.setenv("WORKER_EXIT", "cpt wait")

    def interrupt():
        deadline = time.monotonic() + 20
        while not (HOME / "waiting").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(Stopped):
        run(recipe)
    thread.join()
    assert started() == ["1-cpt"]


def test_everything_is_checked_before_the_first_step_starts(recipe):
    with pytest.raises(UserError, match=r"step sft: unknown key 'optim.lrr' - did you mean 'optim.lr'"):
        run(recipe, "sft.optim.lrr=1")
    assert not HOME.exists()


def test_list_says_what_would_be_done_and_does_nothing(recipe):
    run(recipe)
    started()
    entries = run(recipe, "cpt.train.max_steps=3", list_only=True)
    assert [(e["status"], e["why"]) for e in entries] == [
        ("to do", "redone, train.max_steps null -> 3"),
        ("to do", "its input cpt is to be done first"),
    ]
    assert started() == []
    assert not list(HOME.glob("*.old-*"))


def test_run_dir_is_the_recipes_directory_and_can_be_moved(recipe, tmp_path):
    run(recipe, f"run.dir={tmp_path / 'a'}")
    (tmp_path / "a").rename(tmp_path / "b")
    entries = run(recipe, f"run.dir={tmp_path / 'b'}")
    assert [e["status"] for e in entries] == ["skipped", "skipped"]


def test_seconds_of_a_resumed_step_add_up(recipe, monkeypatch):
    monkeypatch.setenv("WORKER_EXIT", "cpt 75")
    with pytest.raises(Stopped):
        run(recipe)
    first = json.loads((HOME / "1-cpt.digest.json").read_text())["seconds"]
    monkeypatch.delenv("WORKER_EXIT")
    assert run(recipe)[0]["seconds"] > first > 0


@pytest.mark.parametrize(
    ("words", "steps"),
    [
        (["sft.+peft=lora"], {"cpt": [], "sft": ["+peft=lora"]}),
        (["+sft.peft=lora"], {"cpt": [], "sft": ["+peft=lora"]}),
        (["+peft=lora"], {"cpt": ["+peft=lora"], "sft": ["+peft=lora"]}),
        (
            ["sft.train.max_steps=1", "train.max_steps=2"],
            {"cpt": ["train.max_steps=2"], "sft": ["train.max_steps=1", "train.max_steps=2"]},
        ),
    ],
)
def test_overrides_reach_the_steps_they_name(recipe, words, steps):
    plain = {step.name: step.words for step in load_recipe(str(recipe), []).steps}
    found = {step.name: step.words for step in load_recipe(str(recipe), words).steps}
    assert {name: list(found[name][len(plain[name]) :]) for name in found} == steps


def test_a_step_called_dpo_has_a_section_dpo(recipe):
    recipe.write_text(RECIPE + "  dpo:\n")
    overrides = load_recipe(str(recipe), ["dpo.beta=0.2", "dpo.optim.lr=1", "dpo.dpo.loss=ipo"]).steps[2].words
    assert overrides == ("model=tiny", "dpo.beta=0.2", "optim.lr=1", "dpo.loss=ipo")


def test_every_stage_can_be_a_step(recipe):
    recipe.write_text("name: all\ndescription: all\nsteps:\n" + "".join(f"  {stage}:\n" for stage in stages()))
    assert [step.stage for step in load_recipe(str(recipe), []).steps] == list(stages())


def test_init_of_a_step_is_a_step_above_or_something_outside(recipe):
    recipe.write_text(RECIPE + "  dpo: {init: cpt}\n")
    assert [step.parent for step in load_recipe(str(recipe), []).steps] == [None, "cpt", "cpt"]
    steps = load_recipe(str(recipe), ["init=some/model", "sft.init=null"]).steps
    assert [(step.parent, step.init) for step in steps] == [(None, "some/model"), (None, None), ("cpt", None)]


@pytest.mark.parametrize(
    ("text", "words", "message"),
    [
        (RECIPE + "    overides: [a=1]\n", [], "unknown key 'steps.sft.overides' - did you mean 'overrides'"),
        (RECIPE.replace("description", "descripton"), [], "did you mean 'description'"),
        (RECIPE + "  sftt:\n", [], "there is no stage 'sftt' - did you mean 'sft'"),
        (RECIPE + "  dpo: {init: stf}\n", [], "there is no step 'stf' - did you mean 'sft'"),
        (RECIPE + "  data: {stage: dpo}\n", [], "not a config key such as 'data'"),
        (RECIPE.replace("cpt:", "cpt: {init: sft}"), [], "'sft' is no step above 'cpt'"),
        (RECIPE + "  [", [], "small.yaml"),
        ("steps: {}", [], "small.yaml"),
        (RECIPE, ["stf.train.seed=1"], "did you mean 'sft'"),
        (RECIPE, ["train.seed"], "is no override"),
        (RECIPE, ["sft.run.dir=x"], "give run.dir=x"),
    ],
)
def test_mistakes_are_one_line_that_names_the_fix(recipe, text, words, message):
    recipe.write_text(text)
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe), words)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_unknown_recipe_or_step_names_the_near_one(recipe):
    with pytest.raises(UserError, match="did you mean 'python_expert'"):
        run("python_exprt")
    with pytest.raises(UserError, match="did you mean 'sft'"):
        run(recipe, from_step="stf")


@pytest.mark.parametrize("name", recipe_names())
def test_every_shipped_recipe_composes_and_carries_its_name(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe(name, []).name == name
    assert (root("recipes") / f"{name}.yaml").read_text().startswith("#")
    entries = run_recipe(name, [], from_step=None, fresh=False, list_only=True)
    assert {entry["status"] for entry in entries} == {"to do"}
