"""What is refused before the first of several runs: files that are not there, and figures that nothing measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.judged import require_measured
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.launch.recipe_runner import run_recipe
from posttrain.launch.tune import tune

WORDS = ["model=tiny", "train.max_steps=40"]
TYPOS = [
    (["data.path=gone.jsonl"], "gone.jsonl: no such file"),
    (["data.path=chat.jsnol"], "chat.jsnol: no such file - did you mean 'chat.jsonl'?"),
    (["data.path=[chat.jsonl,gone.jsonl]"], "gone.jsonl: no such file"),
    (["data.path=builtin:question"], "no built-in data 'question' - did you mean 'questions'?"),
    (["data.path=chat.jsonl", "data.eval_path=gone.jsonl"], "gone.jsonl: no such file"),
    (["data.path=chat.jsonl", "data.decontaminate=gone.jsonl"], "gone.jsonl: no such file"),
    (["data.path=chat.jsonl", "eval.sets.mine=gone.txt"], "gone.txt: no such file"),
    (["data=mix", "data.sources.a={path: gone.jsonl, share: 1}"], "gone.jsonl: no such file"),
    (["data.path=chat.jsonl", "model.chat_template=gone.jinja"], "'gone.jinja' is neither chatml nor a file"),
    (["data.path=chat.jsonl", "init=runs/sft/gone"], "init: runs/sft/gone does not exist"),
    (["data.path=chat.jsonl", "model.name=./gone"], "model.name: './gone' is no directory"),
]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": "1", "completion": "2"}) + "\n")
    return tmp_path


@pytest.mark.parametrize(("words", "said"), TYPOS)
def test_a_file_that_is_not_there_ends_a_sweep_and_a_tune_before_their_first_run(words: list[str], said: str, here: Path) -> None:
    for begin in (
        lambda: tune("sft", [*WORDS, *words], ["optim.lr=1e-4,1e-3"], 2, 3, "eval/loss", False),
        lambda: posttrain.sweep("sft", *WORDS, *words, "optim.lr=1e-4,1e-3"),
    ):
        with pytest.raises(UserError) as caught:
            begin()
        assert said in str(caught.value) and "\n" not in str(caught.value)
        assert not (here / "runs").exists()


def test_only_one_of_a_sweeps_files_is_not_there(here: Path) -> None:
    with pytest.raises(UserError, match=r"gone.jsonl: no such file"):
        posttrain.sweep("sft", *WORDS, "data.path=chat.jsonl,gone.jsonl")
    assert not (here / "runs").exists()


def test_pictures_that_are_not_there(here: Path) -> None:
    words = ["model=tiny", "data.instance_dir=gone", "data.instance_prompt=a", "data.class_prompt=b"]
    with pytest.raises(UserError, match=r"gone does not exist"):
        posttrain.sweep("dreambooth", *words, "train.seed=1,2")
    assert not (here / "runs").exists()


def test_a_recipes_last_step_is_looked_at_before_its_first(here: Path) -> None:
    steps = "steps:\n  sft: {overrides: [data.path=chat.jsonl]}\n  dpo: {init: sft, overrides: [data.path=gone.jsonl]}\n"
    (here / "mine.yaml").write_text("name: mine\ndescription: mine\n" + steps)
    with pytest.raises(UserError, match=r"step dpo: gone.jsonl: no such file"):
        run_recipe("mine.yaml", ["model=tiny"], None, False)
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("stage", "words", "metric", "said"),
    [
        ("sft", [], "eval/los", "no evaluation of sft measures 'eval/los' - did you mean 'eval/loss'? (there are: eval/loss, "),
        ("sft", [], "eval/accuracy", "no evaluation of sft measures 'eval/accuracy'"),
        ("sft", [], "loss", "'loss' - did you mean 'eval/loss'?"),
        ("sft", [], "train/loss", "'train/loss'"),
        ("sft", [], "answers/f1", "'answers/f1'"),
        ("sft", ["eval.generate.prompts=2", "eval.generate.metrics=[exact]"], "answers/f1", "answers/exact"),
        ("sft", [], "tasks/gsm8k/acc", "'tasks/gsm8k/acc'"),
        ("sft", [], "general/loss", "'general/loss'"),
        ("sft", ["data.path=chat.jsonl", "data.eval_share=0"], "eval/loss", "eval/loss is of held-out rows, and there is none"),
        ("dpo", [], "eval/acuracy", "did you mean 'eval/accuracy'?"),
    ],
)  # fmt: skip
def test_a_metric_that_nothing_measures_is_refused_before_a_tune_begins(
    stage: str, words: list[str], metric: str, said: str, here: Path
) -> None:
    with pytest.raises(UserError) as caught:
        tune(stage, [*WORDS, *words], ["optim.lr=1e-4,1e-3"], 2, 3, metric, False)
    assert said in str(caught.value) and str(caught.value).startswith("--metric: ") and not (here / "runs").exists()


def test_what_a_run_is_judged_by_is_one_of_its_stages_figures() -> None:
    words = ["train.eval_steps=5", "train.keep_best=eval/accuracy"]
    with pytest.raises(UserError, match=r"train.keep_best: no evaluation of sft measures 'eval/accuracy'"):
        compose_run("sft", words)
    assert compose_run("dpo", words)["train"]["keep_best"] == "eval/accuracy"
    with pytest.raises(UserError, match=r"train.early_stopping.metric: no evaluation of dpo measures 'eval/perplexity'"):
        compose_run("dpo", ["train.eval_steps=5", "train.early_stopping={patience: 2, metric: eval/perplexity}"])


FIGURES = [
    ("cpt", []), ("sft", ["eval.generate.prompts=2", "eval.generate.max_new_tokens=4"]), ("rm", []), ("dpo", []),
    ("dpo", ["dpo.loss=kto"]), ("dpo", ["dpo.loss={sigmoid: 1, sft: 0.2}"]), ("ppo", ["reward.function=length"]),
    ("ppo", ["reward.function=[length,exact]", "reward.gold=length"]),
]  # fmt: skip


@pytest.mark.parametrize(("stage", "words"), FIGURES)
@pytest.mark.slow
def test_a_stages_figures_are_those_that_it_measures(stage: str, words: list[str], tmp_path: Path) -> None:
    small = ["model=tiny", "train.max_steps=1", "data.max_rows=30", "data.eval_rows=4", "eval.sets=null", "train.batch_size=2"]
    small += ["rollout.max_new_tokens=4"] if stage == "ppo" else []
    posttrain.run(stage, *small, *words, f"run.dir={tmp_path}/run")
    first = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[0])
    measured = {name for name in first if name.startswith("eval/")}
    cfg = typed_config(compose_run(stage, [*small, *words]))
    assert measured
    for name in measured:
        require_measured(cfg, name, "--metric")
