"""Answers to a file of prompts: their log-probs by a plain forward pass, going on after a stop, and the rows made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from posttrain.commands.answers_file import Answers, best_rows, pair_rows
from posttrain.commands.generate import Wanted, generate
from posttrain.errors import UserError
from posttrain.models.language.loading import load_model

PROMPTS = ["What is a list?", "What is 2 + 2?", "Name a colour.", "Say nothing.", "Why?"]


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": each, "known": len(each)}) + "\n" for each in PROMPTS))
    return str(file)


def wanted(folder: Path) -> Wanted:
    return Wanted(folder / "answers.jsonl", 3, 0.8, 1.0, 6, 5, 6)


def test_log_probs_are_those_of_a_plain_forward_pass(prompts: str, tmp_path: Path) -> None:
    (line, *_) = found = generate(["tiny", prompts], wanted(tmp_path))
    assert [len(each["answers"]) for each in found] == [3] * 5 and line["columns"] == {"known": 15}
    live = load_model("tiny")
    prompt = live.encoder.encode_prompt({"prompt": PROMPTS[0]})
    for answer in line["answers"]:
        tokens = live.tokenizer(answer["text"], add_special_tokens=False)["input_ids"]
        if len(tokens) != answer["tokens"] or answer["ended"]:
            continue  # it is not read back as it was written
        ids = torch.tensor([[*prompt, *tokens]])
        with torch.no_grad():
            logps = (live.model(ids).logits[0, len(prompt) - 1 : -1].float() / 0.8).log_softmax(-1)
        assert answer["logps"] == pytest.approx(logps.gather(1, ids[0, len(prompt) :, None])[:, 0].tolist(), abs=0.02)
        assert answer["logp"] == pytest.approx(sum(answer["logps"]), abs=1e-4)
        break
    else:
        pytest.fail("no answer can be compared")


def test_what_is_in_the_file_is_not_made_again(prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = generate(["tiny", prompts, "reward.function=posttrain.rewards:brevity"], wanted(tmp_path))
    file = tmp_path / "answers.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    assert [json.loads(line) for line in lines] == whole
    file.write_text("".join(lines[:3]) + lines[3][:40])  # stopped in the midst of a line, and of a batch of two prompts
    assert generate(["tiny", prompts, "reward.function=posttrain.rewards:brevity"], wanted(tmp_path)) == whole
    assert file.read_text().splitlines(keepends=True) == lines
    monkeypatch.setattr("posttrain.models.language.one_base.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert generate(["tiny", prompts, "reward.function=posttrain.rewards:brevity"], wanted(tmp_path)) == whole
    with pytest.raises(UserError, match=r"line 1 of .*answers.jsonl was made by another model, prompt or setting"):
        generate(["tiny", prompts, "reward.function=posttrain.rewards:brevity"], replace(wanted(tmp_path), seed=6))


def lines_of(*scores: list[float | None]) -> list[dict[str, object]]:
    return [
        {"prompt": f"p{i}", "answers": [{"text": f"{i}{k}", "score": score} for k, score in enumerate(each)]}
        for i, each in enumerate(scores)
    ]


def test_rows_by_hand() -> None:
    found = lines_of([0.1, 0.9, 0.9, 0.0], [0.2, 0.2], [None, 0.3], [None, None], [None, 1.0, -1.0])
    assert best_rows(found, None) == [
        {"prompt": "p0", "completion": "01"}, {"prompt": "p1", "completion": "10"}, {"prompt": "p2", "completion": "21"},
        {"prompt": "p4", "completion": "41"},
    ]  # fmt: skip
    assert [row["prompt"] for row in best_rows(found, 0.9)] == ["p0", "p4"]
    assert pair_rows(found) == [
        {"prompt": "p0", "chosen": "01", "rejected": "03"}, {"prompt": "p4", "chosen": "41", "rejected": "42"},
    ]  # fmt: skip


def test_rows_are_read_by_the_stages(prompts: str, tmp_path: Path) -> None:
    from posttrain.data.formats import recognise

    asked = replace(wanted(tmp_path), best_of=tmp_path / "best.jsonl", pairs=tmp_path / "pairs.jsonl")
    found = generate(["tiny", prompts, "reward.function=length", "reward.options.length.at_most=4"], asked)
    assert all(isinstance(answer["score"], float) for line in found for answer in line["answers"])
    shapes = {name: recognise(json.loads((tmp_path / f"{name}.jsonl").read_text().splitlines()[0])) for name in ("best", "pairs")}
    assert shapes == {"best": "prompt_completion", "pairs": "pairs"}


@pytest.mark.parametrize(
    ("words", "changes", "match"),
    [
        ([], {"temperature": 0.0}, "--temperature: 0 draws the likeliest token"),
        ([], {"pairs": Path("p.jsonl")}, "--pairs: nothing says which answer is better"),
        (["reward.function=lenght"], {}, "did you mean 'length'"),
        (["reward.options.length.at_most=3"], {}, "there is no reward; give reward.function"),
        (["reward.function=length", "reward.weights=[1,2]"], {}, "reward.weights: 2 for 1 functions"),
        (["reward.function=length", "reward.timeout=soon"], {}, "reward.timeout: .* valid number"),
        (["reward.whiten=each"], {}, "unknown key 'reward.whiten'"),
        (["model=smollm2"], {}, "model=smollm2: a run or a model is a word of its own here: smollm2"),
        (["reward.function=[length"], {}, r"reward.function: '\[length' is no value"),
        (["+reward.function=length", "+reward.options.length.at_mst=3"], {}, "did you mean 'at_most'"),
        (["reward.function=f1", "reward.options.f1.column=know"], {}, r"did you mean 'known'\?; their columns are known$"),
        (["reward.function=code"], {}, "'tests' is no column of the rows; their columns are known$"),
        (["reward.function=f1"], {}, "f1 has nothing to compare with"),
        ([], {"stop": ("",)}, "--stop: an empty text would end every answer at its first token"),
        ([], {"to": Path("/dev/null/answers.jsonl")}, "--to: cannot write to /dev/null/answers.jsonl: Not a directory"),
        ([], {"to": Path("/")}, "--to: cannot write to /: Is a directory"),
        (["reward.function=length"], {"best_of": Path("/dev/null/b.jsonl")}, "--best-of: cannot write to"),
        (["reward.function=length"], {"best_of": Path("answers.jsonl")}, "--best-of: .*answers.jsonl is the file of --to too"),
        (
            ["reward.function=length"],
            {"best_of": Path("a.jsonl"), "pairs": Path("a.jsonl")},
            "--pairs: .*a.jsonl is the file of --best-of too",
        ),
        (["reward.function=length"], {"pairs": Path("prompts.jsonl")}, "--pairs: .*prompts.jsonl is the file of the prompts too"),
    ],
)
def test_what_does_not_fit_is_refused(
    prompts: str, tmp_path: Path, words: list[str], changes: dict[str, object], match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.models.language.one_base.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=match):
        generate(["tiny", prompts, *words], replace(wanted(tmp_path), **changes))  # pyright: ignore[reportArgumentType]


def test_what_was_refused_leaves_no_file(prompts: str, tmp_path: Path) -> None:
    asked = replace(wanted(tmp_path), best_of=tmp_path / "best.jsonl", pairs=tmp_path / "no" / "pairs.jsonl")
    with pytest.raises(UserError, match="did you mean"):
        generate(["tiny", prompts, "reward.function=lenght"], asked)
    assert [each.name for each in tmp_path.iterdir()] == ["prompts.jsonl"]


def test_lines_end_where_json_lines_end(tmp_path: Path) -> None:
    """A text may hold other line breaks: U+2028, U+0085."""
    file = tmp_path / "answers.jsonl"
    Answers(file, ["a", "b"]).add([{"key": "a", "answers": [{"text": "one\u2028two\x85three"}]}])
    again = Answers(file, ["a", "b"])
    assert list(again.lines) == ["a"] and again.lines["a"]["answers"][0]["text"] == "one\u2028two\x85three"


def test_where_no_reward_applies_it_is_said(
    prompts: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "none_rewards.py").write_text("def nothing(completions): return [None] * len(completions)\n")
    found = generate(["tiny", prompts, "reward.function=none_rewards:nothing"], wanted(tmp_path))
    assert {answer["score"] for line in found for answer in line["answers"]} == {None}
    assert "no reward applies to any of these answers, so none has a score" in capsys.readouterr().out
