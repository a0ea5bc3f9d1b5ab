"""lm-eval's tasks during training: when they are asked, what they are called, and that asking changes nothing."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.evaluation.own_tasks import own_tasks

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.metrics import direction
from posttrain.errors import UserError

SMALL = ("model=tiny", "+peft=lora", "train.max_steps=4", "train.eval_steps=2", "train.batch_size=2", "data.max_rows=20",
         "data.eval_rows=2", "eval.sets=null", "train.max_length=128", "optim.lr=0.01")  # fmt: skip
FILTER = '{name: strict, filter: [{function: regex, regex_pattern: "(7)"}, {function: take_first}]}'
NAMES = {f"tasks/{name}{end}" for name in ("own_choice/acc", "own_written/strict/exact_match") for end in ("", "_stderr")}


@pytest.mark.parametrize(
    ("stage", "words", "said"),
    [
        ("sft", ["eval.harness.every=1"], "eval.tasks: none is named; give eval.tasks=[gsm8k], say"),
        ("sft", ["eval.tasks=[a]", "eval.harness.every=1"], "eval.harness.every: it is in evaluations, and there is none"),
        ("sft", ["eval.tasks=[a]", "train.fsdp=true", "peft=lora"], "eval.tasks: lm-eval asks a whole model"),
        ("sft", ["eval.tasks=[a]", "train.keep_best=tasks/a/acc", "train.eval_steps=2"],
         "eval.harness.every: tasks/a/acc is to be there at each evaluation; say it 1"),
        ("sft", ["train.keep_best=tasks/a/acc", "train.eval_steps=2"], "eval.tasks: none is named"),
        ("rm", ["eval.tasks=[a]"], "eval.tasks: a reward model scores, and answers no task"),
        ("sft", ["eval.harness.shots=-1"], "eval.harness.shots"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(stage: str, words: list[str], said: str) -> None:
    with pytest.raises(UserError) as caught:
        compose_run(stage, words)
    assert said in str(caught.value)


def test_a_file_may_not_name_tasks_that_run_code(tmp_path: Path) -> None:
    (tmp_path / "my.yaml").write_text(f"eval: {{tasks: [a], harness: {{include: {tmp_path}}}}}\n")
    words = [f"--config={tmp_path}/my.yaml"]
    with pytest.raises(UserError, match=r"eval.harness.include: .* has code run, which only you can ask for"):
        compose_run("sft", words)
    assert compose_run("sft", [*words, f"eval.harness.include={tmp_path}"])["eval"]["tasks"] == ["a"]


def test_more_of_a_task_is_better_but_for_perplexity() -> None:
    assert direction("tasks/gsm8k/strict-match/exact_match") == direction("tasks/a/acc_norm") == 1
    assert direction("tasks/wikitext/word_perplexity") == -1 and direction("tasks/a/acc_stderr") == 0


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_tasks(tmp_path_factory.mktemp("tasks"), FILTER) as folder:
        yield folder


def lines_of(run: Path) -> dict[int, dict[str, float]]:
    found: dict[int, dict[str, float]] = {}
    for line in (run / "metrics.jsonl").read_text().splitlines():
        each = json.loads(line)
        found.setdefault(each["step"], {}).update(each)
    return found


@pytest.mark.slow
def test_a_run_is_asked_and_stays_the_same_run(include: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ["eval.tasks=[own_choice,own_written]", f"eval.harness.include={include}", "eval.harness.batch_size=3"]
    often = posttrain.run("sft", *SMALL, *asked, "eval.harness.every=1", f"run.dir={tmp_path}/often")
    ends = posttrain.run("sft", *SMALL, *asked, "eval.harness.every=3", f"run.dir={tmp_path}/ends")
    name = "adapter/adapter_model.safetensors"
    assert often["files"][name] == ends["files"][name]  # asked in the middle, or not
    assert (
        "eval.tasks: asked by the chat template, with each task's own number of examples, 3 at a time" in capsys.readouterr().out
    )
    for run, steps in (("often", [0, 2, 4]), ("ends", [0, 4])):
        found = lines_of(tmp_path / run)
        assert [step for step, line in sorted(found.items()) if set(line) & NAMES] == steps
        assert all(set(found[step]) >= NAMES for step in steps)
    assert set(often["metrics"]) >= NAMES | {f"{each}_before" for each in NAMES}
    figures = posttrain.evaluate(str(tmp_path / "often"), "tasks=own_choice,own_written", f"include={include}")["often"]
    assert {f"tasks/{key}": value for key, value in figures.items()} == {key: often["metrics"][key] for key in NAMES}


@pytest.mark.slow
def test_a_task_that_there_is_not_is_refused_before_a_model_loads(include: Path, tmp_path: Path) -> None:
    words = [*SMALL, "eval.tasks=[own_choise]", f"eval.harness.include={include}", "model.name=tiny"]
    with pytest.raises(UserError, match=r"eval.tasks: lm-eval has no 'own_choise' - did you mean 'own_choice'\?"):
        posttrain.run("sft", *words, f"run.dir={tmp_path}/no")
    assert not (tmp_path / "no" / "metrics.jsonl").exists()


@pytest.mark.slow
def test_a_policy_is_asked_too(include: Path, tmp_path: Path) -> None:
    words = [
        "model=tiny",
        "+peft=lora",
        "train.max_steps=1",
        "train.batch_size=2",
        "train.grad_accum=1",
        "data.max_rows=8",
        "data.eval_rows=2",
    ]
    words += ["reward.function=length", "ppo.advantage=grpo", "ppo.samples=2", "rollout.max_new_tokens=4", "eval.sets=null"]
    found = posttrain.run("ppo", *words, "eval.tasks=[own_choice]", f"eval.harness.include={include}", f"run.dir={tmp_path}/ppo")
    assert {"tasks/own_choice/acc", "tasks/own_choice/acc_before", "tasks/own_choice/acc_stderr"} <= set(found["metrics"])
