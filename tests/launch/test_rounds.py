"""Recipes with rounds: which steps they become, what each starts from and learns, and that a round goes on in its middle."""

import copy
import functools
import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

import posttrain.config.compose
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch import recipe_runner
from posttrain.launch.answers_step import ROWS, answers_config
from posttrain.launch.recipe import load_recipe
from posttrain.launch.recipe_runner import run_recipe

RECIPE = """
name: rounds
description: dpo on its own answers
overrides: [model=tiny]
steps:
  sft:
    overrides: [train.max_steps=1]
  rounds:
    repeat: 3
    steps:
      answers:
        stage: generate
        overrides: [prompts=prompts.jsonl, reward.function=length, rows=pairs, "part={round}/3", "seed={round}"]
      dpo:
        overrides: [data.path=answers, "train.seed={round}"]
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rounds.yaml").write_text(RECIPE)
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "say a"}\n')
    return tmp_path / "rounds.yaml"


def _with(recipe: Path, text: str) -> Path:
    recipe.write_text(text)
    return recipe


def test_each_round_starts_from_the_one_before(recipe: Path) -> None:
    steps = load_recipe(str(recipe), []).steps
    assert [(s.name, s.stage, s.parent) for s in steps] == [
        ("sft", "sft", None),
        ("answers-1", "generate", "sft"), ("dpo-1", "dpo", "sft"),
        ("answers-2", "generate", "dpo-1"), ("dpo-2", "dpo", "dpo-1"),
        ("answers-3", "generate", "dpo-2"), ("dpo-3", "dpo", "dpo-2"),
    ]  # fmt: skip
    assert steps[3].words == ("prompts=prompts.jsonl", "reward.function=length", "rows=pairs", "part=2/3", "seed=2")
    assert steps[4].words == ("model=tiny", "data.path=answers-2", "train.seed=2")
    # what is no name of a step stays what it is, even where a step is called so
    called = load_recipe(
        str(_with(recipe, RECIPE.replace("dpo:", "pairs:").replace("pairs:\n", "pairs:\n        stage: dpo\n"))), []
    ).steps
    assert called[1].words[2] == "rows=pairs" and called[2].name == "pairs-1"
    # a name of the round that does not stand above is that of the round before; in the first one, the step before all rounds
    text = RECIPE.replace("stage: generate", "stage: generate\n        init: dpo")
    recipe.write_text(text.replace("      dpo:\n", "      dpo:\n        init: sft\n"))
    assert [s.parent for s in load_recipe(str(recipe), []).steps] == [None, "sft", "sft", "dpo-1", "sft", "dpo-2", "sft"]


def test_words_reach_all_rounds_or_one(recipe: Path) -> None:
    words = ["dpo.dpo.beta=0.3", "dpo-2.optim.lr=1e-4", "answers.samples=8", "train.max_steps=2", "rounds.repeat=2"]
    found = {step.name: step.said for step in load_recipe(str(recipe), words).steps}
    assert found == {
        "sft": ("train.max_steps=2",),
        "answers-1": ("samples=8",), "dpo-1": ("dpo.beta=0.3", "train.max_steps=2"),
        "answers-2": ("samples=8",), "dpo-2": ("dpo.beta=0.3", "optim.lr=1e-4", "train.max_steps=2"),
    }  # fmt: skip


def test_a_word_of_the_user_names_its_round_too(recipe: Path) -> None:
    words = ["answers.part={round}/96", "dpo-2.train.seed=1{round}", "sft.data.path={round}.jsonl", "rounds.repeat=2"]
    found = {step.name: step.said for step in load_recipe(str(recipe), words).steps}
    assert found == {
        "sft": ("data.path={round}.jsonl",),  # which is in no round
        "answers-1": ("part=1/96",), "dpo-1": (), "answers-2": ("part=2/96",), "dpo-2": ("train.seed=12",),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("    repeat: 3\n", "", "steps of a step are rounds; say repeat: 3"),
        ("data.path=answers", "data.path=dpo", "in the first round 'dpo' has made nothing yet"),
        ("      dpo:\n", "      sft:\n        stage: dpo\n", "another step has this name"),
        ("      dpo:\n", "      dpo:\n        init: answers\n", "'answers-1' makes rows, not a model"),
        ("    repeat: 3\n", "    repeat: 3\n    stage: dpo\n", "rounds have repeat and steps alone"),
    ],
)
def test_what_does_not_fit_is_one_line(recipe: Path, old: str, new: str, said: str) -> None:
    recipe.write_text(RECIPE.replace(old, new))
    with pytest.raises(UserError) as caught:
        load_recipe(str(recipe), [])
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_what_a_step_of_answers_may_be_told() -> None:
    right = ["prompts=p.jsonl", "reward.function=length", "reward.options.length.at_most=9"]
    found = answers_config(right, ["rows=best"])
    assert found["rows"] == "best" and found["samples"] == 4 and found["words"]["reward.options.length.at_most"] == "9"
    for words, message in {
        ("prompts=p", "reward.function=length", "sampels=4"): "did you mean 'samples'",
        ("prompts=p",): "reward.function: nothing says which answer is better",
        ("reward.function=length",): "prompts: Field required",
        ("prompts=p", "reward.function=length", "part=4/3"): "^part: '4/3' is no part; say 2/3",
        ("prompts=p", "reward.function=my:own"): "which only you can ask for",
    }.items():
        with pytest.raises(UserError, match=message):
            answers_config(words, [])
    assert answers_config(["prompts=p"], ["reward.function=my:own"])["words"] == {"reward.function": "my:own"}


# Writes what a step leaves: the rows of `posttrain generate`, or a run whose weights follow from its config and its rows.
CHILD = """
import hashlib, json, os, sys, yaml
from pathlib import Path
with open("started.txt", "a") as log:
    if sys.argv[1] == "generate":
        to = Path(sys.argv[sys.argv.index("--pairs") + 1])
        log.write(to.parent.name + chr(10))
        to.parent.mkdir(parents=True, exist_ok=True)
        if os.environ.get("FAILS") == to.parent.name:
            sys.exit(int(os.environ["CODE"]))
        to.write_text(" ".join(sys.argv[2:4]) + (Path(sys.argv[2]) / "adapter" / "weights").read_text())
        sys.exit(0)
    config = yaml.safe_load(Path(sys.argv[1]).read_text())
    run = Path(config["run"]["dir"])
    log.write(run.name + chr(10))
(run / "adapter").mkdir(parents=True)
(run / "config.yaml").write_text(yaml.safe_dump(config))
rows = Path(config["data"]["path"])
said = [config["init"], config["dpo"]["beta"] if "dpo" in config else 0, rows.read_text() if rows.exists() else ""]
weights = hashlib.sha256(repr(said).encode()).hexdigest()
(run / "adapter" / "weights").write_text(weights)
(run / "manifest.json").write_text(json.dumps({
    "stage": config["stage"], "parents": [], "base": {"name": "tiny"}, "weights": {"kind": "adapter", "path": "adapter"},
    "files": {"adapter/weights": weights}, "config_digest": weights, "metrics": {"eval/loss": 1.0, "eval/loss_before": 2.0},
    "steps": 1, "tokens": 1, "seconds": 1.0,
}))
"""


def started() -> list[str]:
    log = Path("started.txt")
    found = log.read_text().split() if log.exists() else []
    log.unlink(missing_ok=True)
    return found


@pytest.fixture
def children(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("child.py").write_text(CHILD)
    child = [sys.executable, "child.py"]
    monkeypatch.setattr("posttrain.launch.subprocess_runner.worker_command", lambda file: [*child, file])
    monkeypatch.setattr(recipe_runner, "own_command", lambda words: [*child, *words])
    monkeypatch.setattr("posttrain.config.compose.compose", lambda stage, words: copy.deepcopy(_composed(stage, tuple(words))))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(sys.path))


_compose = posttrain.config.compose.compose


@functools.cache
def _composed(stage: str, words: tuple[str, ...]) -> Any:
    return _compose(stage, list(words))


def run(recipe: Path, *words: str, from_step: str | None = None) -> list[str]:
    return [entry["status"] for entry in run_recipe(str(recipe), [*words, "rounds.repeat=2"], from_step, fresh=False)]


@pytest.mark.usefixtures("children")
def test_a_round_goes_on_in_its_middle_and_a_change_redoes_what_follows(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    every = ["1-sft", "2-answers-1", "3-dpo-1", "4-answers-2", "5-dpo-2"]
    monkeypatch.setenv("FAILS", "4-answers-2")
    for code, error in (("75", Stopped), ("1", RunError)):
        monkeypatch.setenv("CODE", code)
        with pytest.raises(error, match="answers-2"):
            run(recipe)
    assert started() == [*every[:4], "4-answers-2"]
    monkeypatch.delenv("FAILS")
    assert run(recipe) == ["skipped"] * 3 + ["done"] * 2 and started() == every[3:]
    home = Path("runs/recipes/rounds")
    assert (home / "4-answers-2" / ROWS).read_text().startswith(f"{home}/3-dpo-1 prompts.jsonl"), "by the round before's model"
    config = yaml.safe_load((home / "5-dpo-2" / "config.yaml").read_text())
    assert config["data"]["path"] == f"{home}/4-answers-2/{ROWS}" and config["init"] == f"{home}/3-dpo-1"
    assert run(recipe) == ["skipped"] * 5 and started() == []
    assert run(recipe, "answers-2.temperature=0.7") == ["skipped"] * 3 + ["done"] * 1 + ["skipped"] and started() == every[3:4]
    assert run(recipe, "answers-2.temperature=0.7", from_step="dpo")[2:] == ["done"] * 3
    assert "done" in (home / "report.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["iterative_dpo", "best_of_n"])
def test_the_shipped_recipes_on_a_tiny_model(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": f"say {i}", "completion": f"say {i} again and again"} for i in range(24)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["model=tiny", "sft.data.path=rows.jsonl", "data.eval_share=0", "train.max_steps=2", "rounds.repeat=1"]
    words += ["eval.sets=null"]
    words += ["answers.prompts=rows.jsonl", "answers.samples=2", "answers.max_new_tokens=8", "answers.part=1/4"]
    words += ["answers.reward.function=length", "answers.reward.options.length.at_most=3"]
    entries = run_recipe(name, words, from_step=None, fresh=False)
    assert [entry["status"] for entry in entries] == ["done"] * 3
    made = (Path(entries[1]["dir"]) / ROWS).read_text().splitlines()
    keys = {"prompt", "chosen", "rejected"} if name == "iterative_dpo" else {"prompt", "completion"}
    assert made and all(json.loads(line).keys() == keys for line in made)
