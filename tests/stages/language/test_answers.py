"""Answers to held-out prompts during training: which prompts, what they are worth, and what the page has of them."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

import posttrain
from posttrain.config.compose import compose_run
from posttrain.data.examples import Examples, build
from posttrain.errors import UserError
from posttrain.models.language.generation import Answer
from posttrain.rewards import load_function
from posttrain.stages.language import answers
from posttrain.stages.language.answers import held_out_prompts, prompt_and_answer
from posttrain.stages.language.samples import keep_samples
from posttrain.training.processes import Processes

WORDS = dict(enumerate("the cat sat on a mat . dog".split(), 10))


class Words:
    """A tokenizer of eight words."""

    def decode(self, tokens: list[int], skip_special_tokens: bool = False) -> str:
        return " ".join(WORDS[token] for token in tokens)


def conversation() -> Examples:
    """Two turns of the assistant; what follows the last one does not count."""
    return build([([10, 11, 12, 13, 14, 15, 16], [0, 1, 0, 0, 1, 1, 0], 0)])


def config(prompts: int, *metrics: str, **options: Any) -> Any:
    generate = SimpleNamespace(prompts=prompts, metrics=list(metrics), options=options, max_new_tokens=4, temperature=0.0)
    return SimpleNamespace(eval=SimpleNamespace(generate=generate), train=SimpleNamespace(batch_size=2, seed=1))


def test_where_an_answer_begins() -> None:
    assert prompt_and_answer(conversation(), 0) == ([10, 11, 12, 13], [14, 15])
    pair = build([([10, 11, 12, 13, 14], [0, 0, 1, 1, 1], 0)], [(2, 4)])
    assert prompt_and_answer(pair, 0) == ([10, 11], [12, 13])  # the chosen one
    document = build([([10, 11, 12, 13, 14], [1] * 5, 0), ([10] * 300, [0, *[1] * 299], 1)])
    assert prompt_and_answer(document, 0) == ([10, 11], [12, 13, 14])
    assert [len(part) for part in prompt_and_answer(document, 1)] == [64, 236]


def test_scores_by_name_and_the_page_by_hand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    held_out = build([([10, 11, 12, 13, 14, 15], [0, 0, 1, 1, 1, 1], 0), ([10, 17, 12, 16], [0, 0, 1, 1], 1)])
    found = held_out_prompts(config(2, "f1", "exact"), held_out, Words(), [16])
    assert found and found.prompts == [[10, 11], [10, 17]] and found.references == ["sat on a mat", "sat ."]
    assert (found.sampling.temperature, found.sampling.top_k, found.sampling.max_new_tokens) == (1.0, 1, 4)
    drawn = [[Answer([12, 13, 10, 15], [0.0] * 4, False, 0.0)], [Answer([12, 16], [0.0] * 2, True, 0.0)]]
    monkeypatch.setattr(answers, "sample", lambda *asked: drawn)
    keep = answers.keeper(tmp_path, 2, 8)
    measured = found.measure(None, Processes(), keep)  # type: ignore[arg-type]
    # "sat on the mat" of "sat on a mat": 3 shared of 4 and 4; "sat ." is right
    assert measured == {"answers/f1": pytest.approx(0.875), "answers/exact": 0.5, "eval/length": 3.0, "eval/ended": 0.5}
    first = json.loads((tmp_path / "samples.json").read_text())[0]
    assert (first["prompt"], first["reference"]) == ("the cat", "sat on a mat")
    scores = {"f1": 0.75, "exact": 0.0}
    assert first["answers"] == [{"step": 2, "label": "step 2", "text": "sat on the mat", "scores": scores}]


def test_a_run_that_goes_on_writes_its_later_samples_again(tmp_path: Path) -> None:
    for done, text in ((0, "a"), (2, "b"), (4, "c"), (2, "b"), (4, "d"), (4, "d")):
        keep_samples(tmp_path, done, 4, ["p"], [text], [{}])
    (kept,) = json.loads((tmp_path / "samples.json").read_text())
    assert [(each["label"], each["text"]) for each in kept["answers"]] == [("before", "a"), ("step 2", "b"), ("after", "d")]


def test_f1_and_rouge_l_by_hand() -> None:
    answer, right = ["the dog sat on the mat"], ["On the mat, the dog!"]  # 5 of 6 and 5 words shared; in order: on the mat
    assert float(load_function("f1", "x")([""], answer, right)[0]) == pytest.approx(2 * 5 / 11)
    assert float(load_function("rouge_l", "x")([""], answer, right)[0]) == pytest.approx(2 * 3 / 11)
    assert float(load_function("rouge_l", "x")([""], [""], ["x"])[0]) == 0.0


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (config(0, "f1"), "eval.generate.metrics: they score answers, and none is asked for"),
        (config(2, "f11"), "eval.generate.metrics: there is no reward 'f11' - did you mean 'f1'?"),
        (config(2, "exact", regex={"pattern": "x"}), "eval.generate.options.regex: no eval.generate.metrics is so called"),
        (config(2, "exact", "exact"), "'exact' has the name of another"),
        (config(2, "code"), "'tests' is no column of the rows"),
    ],
)
def test_what_cannot_be_scored_is_refused(asked: Any, said: str) -> None:
    with pytest.raises(UserError) as caught:
        held_out_prompts(asked, conversation(), Words(), [16])
    assert said in str(caught.value)
    with pytest.raises(UserError, match="no row is held out"):
        held_out_prompts(config(2), build([]), Words(), [16])


@pytest.mark.parametrize(("stage", "said"), [("rm", "writes nothing"), ("ppo", "by itself, and scores them by reward.function")])
def test_who_does_not_answer_says_so(stage: str, said: str) -> None:
    with pytest.raises(UserError, match=f"eval.generate: .*{said}"):
        compose_run(stage, ["model=tiny", "eval.generate.prompts=2", *(["reward.function=exact"] if stage == "ppo" else [])])


@pytest.mark.slow
def test_a_run_keeps_the_best_by_its_answers(tmp_path: Path) -> None:
    talk = [("Say", i) for i in range(40)]
    rows = [[{"role": "user", "content": f"{a} {i}"}, {"role": "assistant", "content": f"It is {i}."}] for a, i in talk]
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    words = ["model=tiny", f"data.path={tmp_path}/chat.jsonl", "data.eval_share=0.2", "train.max_steps=4", "train.batch_size=2"]
    words += ["train.eval_steps=2", "eval.sets=null", "optim.lr=0.01", "train.keep_best=answers/f1", "eval.generate.prompts=3"]
    words += ["eval.generate.max_new_tokens=6", "eval.generate.metrics=[f1]", f"run.dir={tmp_path}/run"]
    manifest = posttrain.run("sft", *words)
    assert {"answers/f1", "answers/f1_before", "eval/length", "eval/ended"} <= set(manifest["metrics"])
    assert manifest["best"]["metric"] == "answers/f1" and manifest["best"]["value"] == manifest["metrics"]["answers/f1"]
    page = (tmp_path / "run" / "report.html").read_text()
    assert "Answers to held-out prompts: F1" in page and "the data's answer" in page and ", f1 0" in page


NO_PATTERN = ["eval.generate.metrics=[regex]", "eval.generate.options.regex.pattern='('"]
NO_OPTION = ["eval.generate.metrics=[regex]", "eval.generate.options.regex.patern=a"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval.generate.metrics=[judge]"], r"judge: give its url and model, as eval.generate.options.judge.url="),
        (NO_PATTERN, r"regex.pattern: '\(' is no regular expression"),
        (NO_OPTION, r"regex.patern: regex has"),
    ],
)
def test_a_built_in_reward_is_spoken_of_by_the_words_that_asked_for_it(words: list[str], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^eval.generate.options.{said}"):
        posttrain.run("sft", "model=tiny", "train.max_steps=1", "eval.generate.prompts=2", f"run.dir={tmp_path}/run", *words)
