"""Measuring and talking with results: the run's own figures again, and what plain transformers says."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch

import posttrain
from posttrain.commands.chat import Conversation, chat
from posttrain.commands.evaluate import evaluate_runs
from posttrain.errors import UserError
from posttrain.evaluation.calibration import wilson
from posttrain.models.language.loading import load_model, load_models, switch

WORDS = (
    "model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=30", "data.eval_rows=4", "optim.lr=0.02",
    "eval.rows=4", "model.dtype=float32",
)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    methods = {"a": ["peft=lora", "peft.r=4"], "b": ["peft=lora", "peft.r=2", "train.seed=7"], "full": []}
    for name, words in methods.items():
        posttrain.run("sft", *WORDS, *words, f"run.dir={folder}/{name}")
    posttrain.run("dpo", *WORDS, "peft=lora", f"init={folder}/a", f"run.dir={folder}/dpo")
    return {name: folder / name for name in (*methods, "dpo")}


def measured(run: Path) -> dict[str, float]:
    return json.loads((run / "manifest.json").read_text())["metrics"]


@pytest.mark.parametrize("name", ["a", "full"])
def test_the_runs_own_figures_come_out_again(runs: dict[str, Path], name: str) -> None:
    found = evaluate_runs([str(runs[name])])[name]
    assert found["eval/loss"] == pytest.approx(measured(runs[name])["eval/loss"], abs=1e-5)
    assert found["general/loss"] == pytest.approx(measured(runs[name])["general/loss"], abs=1e-5)


def test_several_adapters_are_switched_between(runs: dict[str, Path]) -> None:
    found = evaluate_runs([str(runs["a"]), str(runs["b"]), "data.path=builtin:general", "rows=4", "max_length=512"])
    for name in ("a", "b"):
        assert found[name]["data/loss"] == pytest.approx(measured(runs[name])["general/loss"], abs=1e-5)


def test_a_base_beside_a_run_is_measured_on_the_runs_rows(runs: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    """Read as the run reads them; both in float32, as the model's files are."""
    found = evaluate_runs(["tiny", str(runs["a"])])
    assert f"rows: those that {runs['a']} has held out, for all" in capsys.readouterr().out
    for key in ("eval/loss", "general/loss"):
        assert found["tiny"][key] == pytest.approx(measured(runs["a"])[f"{key}_before"], abs=1e-5)
        assert found["a"][key] == pytest.approx(measured(runs["a"])[key], abs=1e-5)


def test_runs_of_other_rows_are_measured_on_the_rows_of_the_first(runs: dict[str, Path], tmp_path: Path) -> None:
    other = tmp_path / "other"
    posttrain.run("sft", *WORDS, "data.eval_rows=2", "train.max_steps=1", f"run.dir={other}")
    found = evaluate_runs([str(runs["full"]), str(other)])["other"]
    assert found["general/loss"] == pytest.approx(measured(other)["general/loss"], abs=1e-5)
    own = evaluate_runs([str(other)])["other"]["eval/loss"]
    assert own == pytest.approx(measured(other)["eval/loss"], abs=1e-5) and abs(found["eval/loss"] - own) > 1e-3


def test_a_difference_from_the_first_result_has_an_interval(runs: dict[str, Path]) -> None:
    """Of the same rows: their own spread falls out, so it is far narrower than that of the losses."""
    found = evaluate_runs([str(runs["a"]), str(runs["b"]), "data.path=builtin:questions", "rows=20"])
    low, high = (found["b"][f"data/loss_change_{end}"] for end in ("low", "high"))
    assert (low + high) / 2 == pytest.approx(found["b"]["data/loss"] - found["a"]["data/loss"], abs=1e-6)
    assert 0 < low < high < low + 0.3
    assert not any("change" in name for name in found["a"])


def test_pairs_have_an_interval(runs: dict[str, Path]) -> None:
    found = evaluate_runs([str(runs["dpo"]), "data.path=builtin:preferences", "rows=10"])["dpo"]
    low, high = wilson(found["data/accuracy"], 10)
    assert (found["data/accuracy_low"], found["data/accuracy_high"]) == (low, high)
    assert wilson(0.5, 100) == pytest.approx((0.40383, 0.59617), abs=1e-4)
    assert wilson(1.0, 10)[0] == pytest.approx(0.72247, abs=1e-4)


def test_loss_of_text_by_hand(runs: dict[str, Path], tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"text": "the value of the function is the list"}) + "\n")
    live = load_model(runs["a"])
    ids = torch.tensor([[*live.tokenizer("the value of the function is the list")["input_ids"], live.tokenizer.eos_token_id]])
    with torch.no_grad():
        logits = live.model(ids).logits[0, :-1].double()
    want = -logits.log_softmax(-1).gather(1, ids[0, 1:, None]).mean()
    found = evaluate_runs([str(runs["a"]), f"data.path={file}"])["a"]
    assert found["data/loss"] == pytest.approx(float(want), abs=1e-5)
    assert found["data/perplexity"] == pytest.approx(float(want.exp()), rel=1e-4)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["tiny", "data.pth=x"], "did you mean 'data.path'"),
        (["tiny"], "data.path: a bare model holds nothing out"),
        (["nope", "data.path=builtin:general"], "^run: 'nope' is no directory and not to be had from the hub"),
        (["data.path=x"], "give a run directory"),
        (["tiny", "rows=x", "data.path=builtin:general"], "rows: 'x' is no whole number"),
    ],
)
def test_bad_words(words: list[str], match: str) -> None:
    with pytest.raises(UserError, match=match):
        evaluate_runs(words)


@pytest.mark.parametrize(("words", "field"), [(["model.name=org/none"], "model.name"), (["model=tiny", "init=org/none"], "init")])
def test_a_name_that_nothing_has_is_told_by_the_setting_it_stands_in(words: list[str], field: str) -> None:
    with pytest.raises(UserError, match=f"^{field}: 'org/none' is no directory and not to be had from the hub"):
        posttrain.run("sft", *words)


def test_adapters_of_other_models_cannot_be_switched_to(runs: dict[str, Path]) -> None:
    with pytest.raises(UserError, match="has no adapter on the base"):
        load_models([str(runs["a"]), str(runs["full"])], "cpu")


def test_an_answer_is_plain_greedy_decoding_and_history_is_kept(runs: dict[str, Path]) -> None:
    live = load_model(runs["a"])
    conversation = Conversation(live, 0.0, 1.0, 12)
    said = conversation.answer("What is a list?")
    messages = [{"role": "user", "content": "What is a list?"}]

    def plain() -> str:
        text = live.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        ids = live.tokenizer(text, return_tensors="pt", add_special_tokens=False)["input_ids"]
        for _ in range(12):
            with torch.no_grad():
                token = live.model(ids).logits[0, -1].argmax()
            if int(token) == live.tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, token[None, None]], dim=1)
        start = live.tokenizer(text, add_special_tokens=False)["input_ids"]
        return live.tokenizer.decode(ids[0, len(start) :], skip_special_tokens=True)

    assert said == plain()
    messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "And a set?"}]
    assert conversation.answer("And a set?") == plain()
    assert len(conversation.messages) == 4
    conversation.reset()
    assert conversation.messages == []


def test_switching_by_name_gives_each_runs_own_function(runs: dict[str, Path]) -> None:
    ids = torch.randint(5, 50, (1, 12), generator=torch.Generator().manual_seed(0))
    live, names = load_models([str(runs["a"]), str(runs["b"])], "cpu")
    for name in ("b", "a", "b"):
        switch(live, names, name)
        with torch.no_grad():
            torch.testing.assert_close(live.model(ids).logits, load_model(runs[name]).model(ids).logits, rtol=0, atol=1e-6)


def test_a_pipe_is_answered_line_by_line(
    runs: dict[str, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("What is a list?\n/adapter c\n/adapter b\n/reset\n/help\nWhy?\n"))
    answers: list[Any] = []
    answer = Conversation.answer
    monkeypatch.setattr(Conversation, "answer", lambda self, text, stream=False: answers.append(answer(self, text, stream)))
    chat([str(runs["a"]), str(runs["b"])], None, None, 0.0, 1.0, 5, 0)
    out = capsys.readouterr().out
    assert len(answers) == 2
    assert "there is no adapter 'c'" in out and "b speaks" in out and "forgotten" in out and "/exit ends" in out


def test_runs_whose_directories_share_a_name_are_told_apart(runs: dict[str, Path], tmp_path: Path) -> None:
    """By their paths; a name with a dot in it is one too, which is none of peft's."""
    first, second = tmp_path / "one" / "v1.0", tmp_path / "two" / "v1.0"
    for link, name in ((first, "a"), (second, "b")):
        link.parent.mkdir()
        link.symlink_to(runs[name])
    alone = evaluate_runs([str(runs["a"]), str(runs["b"])])
    found = evaluate_runs([str(first), str(second)])
    assert list(found) == [str(first), str(second)] and list(found.values()) == list(alone.values())
    assert alone["a"] != alone["b"]


def test_win_rates_load_a_base_once(runs: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The adapters of a and b are on one base, full is none: two loads for three results, and each one's answers as if alone."""
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in ("A list?", "2 + 2?", "A colour?")))
    loads: list[str] = []

    def counted(run: Any, *rest: Any, **more: Any) -> Any:
        loads.append(Path(run).name)
        return load_model(run, *rest, **more)

    def answers(*names: str) -> dict[str, list[Any]]:
        monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "-".join(names)))
        words = [f"data.path={prompts}", "max_new_tokens=8", "reward.function=length", "reward.options.length.at_most=5"]
        evaluate_runs([*(str(runs[name]) for name in names), *words])
        kept = sorted((tmp_path / "-".join(names) / "answers").iterdir(), key=lambda path: path.stat().st_mtime_ns)
        return {
            name: [json.loads(line)["answers"] for line in path.read_text().splitlines()]
            for name, path in zip(names, kept, strict=True)
        }

    monkeypatch.setattr("posttrain.models.language.one_base.load_model", counted)
    together = answers("a", "b", "full")
    assert loads == ["a", "full"]
    assert together == answers("a") | answers("b") | answers("full")
    assert together["a"] != together["b"] and loads == ["a", "full", "a", "b", "full"]
