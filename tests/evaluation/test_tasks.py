"""lm-eval's tasks on a run, with the real lm-eval and tasks of our own, so that nothing is downloaded."""

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.evaluation.own_tasks import own_tasks

from posttrain.commands.evaluate import evaluate_runs
from posttrain.errors import UserError
from posttrain.evaluation.tasks import Tasks, _name
from posttrain.models.language.loading import LoadedModel, load_model

FILTERS = (
    '{name: strict, filter: [{function: regex, regex_pattern: "#### (7)"}, {function: take_first}]}',
    '{name: loose, filter: [{function: regex, regex_pattern: "^(.)", fallback: "7"}, {function: take_first}]}',
)


def test_words_of_tasks() -> None:
    asked = Tasks.of({"tasks": "gsm8k, arc_easy", "shots": "0", "chat_template": "false", "batch_size": "4"})
    assert asked == Tasks(("gsm8k", "arc_easy"), None, 0, 4, False, None)
    assert Tasks.of({"tasks": "gsm8k"}) == Tasks(("gsm8k",))


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ({"tasks": "a", "limit": "0"}, "limit: '0' is no whole number above 0"),
        ({"tasks": "a", "shots": "few"}, "shots: 'few' is no whole number"),
        ({"tasks": "a", "chat_template": "yes"}, "chat_template: 'yes' is neither true nor false"),
        ({"tasks": "a", "include": "/nowhere"}, "include: /nowhere is no directory of tasks"),
        ({"tasks": ","}, "tasks: give names of lm-eval's tasks"),
    ],
)
def test_bad_words_of_tasks(words: dict[str, str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        Tasks.of(words).prepared()


def test_words_of_tasks_without_a_task() -> None:
    with pytest.raises(UserError, match="shots: is about lm-eval's tasks; give tasks=NAME,NAME too"):
        evaluate_runs(["tiny", "shots=5"])


def test_figures_by_task_filter_and_metric() -> None:
    names = ("exact_match,strict", "exact_match_stderr,loose", "acc,none")
    assert [_name("t", name) for name in names] == ["t/strict/exact_match", "t/loose/exact_match_stderr", "t/acc"]


def test_without_lm_eval(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r"tasks: lm-eval is not installed .*; pip install 'posttrain\[eval\]'"):
        evaluate_runs(["tiny", "tasks=arc_easy"])


@pytest.fixture(scope="module")
def include(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with own_tasks(tmp_path_factory.mktemp("tasks"), *FILTERS) as folder:
        yield folder


@pytest.fixture(scope="module")
def live(include: Path) -> LoadedModel:
    return load_model("tiny")


@pytest.mark.slow
def test_figures_have_their_filter_and_their_error(include: Path, live: LoadedModel) -> None:
    """A filter that finds nothing gives 0, apart from the other filter's figure; the error is that of six questions."""
    words = {"tasks": "own_choice,own_written", "include": str(include), "shots": "1", "batch_size": "3"}
    asking = Tasks.of(words).prepared()
    assert asking.line(asking.chat(live.tokenizer, True)) == "tasks: asked by the chat template, with 1 examples, 3 at a time"
    before = live.tokenizer.pad_token_id
    found = asking.measure(live.model, live.tokenizer, True)
    assert live.tokenizer.pad_token_id == before
    assert set(found) == {
        "own_choice/acc", "own_choice/acc_stderr", "own_written/strict/exact_match", "own_written/strict/exact_match_stderr",
        "own_written/loose/exact_match", "own_written/loose/exact_match_stderr",
    }  # fmt: skip
    assert found["own_written/strict/exact_match"] == 0.0
    share = found["own_choice/acc"]
    assert share * 6 == pytest.approx(round(share * 6)) and found["own_choice/acc_stderr"] == pytest.approx(
        (share * (1 - share) / 5) ** 0.5
    )


@pytest.mark.slow
def test_the_choice_is_the_models_own(include: Path, live: LoadedModel) -> None:
    """As plain text and without examples: the share of rows whose right word is the likelier one, worked out here."""
    words = {"tasks": "own_choice", "include": str(include), "shots": "0", "chat_template": "false"}
    found = Tasks.of(words).prepared().measure(live.model, live.tokenizer, False)

    def likelihood(text: str, answer: str) -> float:
        start, whole = (live.tokenizer(each, add_special_tokens=False)["input_ids"] for each in (text, text + answer))
        with torch.inference_mode():
            logits = live.model(torch.tensor([whole])).logits[0].float().log_softmax(-1)
        return sum(float(logits[i - 1, whole[i]]) for i in range(len(start), len(whole)))

    right = 0
    for i in range(6):
        text = f"Is {i} more than 2? Answer:"
        yes, no = (likelihood(text, f" {answer}") for answer in ("yes", "no"))
        right += (yes > no) == (i >= 3)
    assert found["own_choice/acc"] == pytest.approx(right / 6)


@pytest.mark.slow
def test_a_task_that_there_is_not(include: Path) -> None:
    with pytest.raises(UserError, match=r"tasks: lm-eval has no 'own_choise' - did you mean 'own_choice'\?"):
        evaluate_runs(["tiny", "tasks=own_choise", f"include={include}"])
