"""Answers of several results to the same prompts: who wins how often, and what is kept."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from posttrain.commands.evaluate import evaluate_runs, show_evaluation
from posttrain.commands.generate import Wanted, generate
from posttrain.commands.win_rates import win_rate
from posttrain.errors import UserError
from posttrain.models.builtin import builtin_directory


def test_a_win_rate_is_of_prompts_in_common_with_ties_as_halves() -> None:
    """Wins at 1 and 2, a tie at 3, a loss at 4; 5 and 6 are of one alone. Wilson's interval of 0.625 among 4, by hand."""
    found = win_rate({1: 1.0, 2: 0.5, 3: 0.2, 4: 0.0, 5: 9.0}, {1: 0.0, 2: 0.4, 3: 0.2, 4: 0.1, 6: 9.0})
    assert found["answers/win_rate"] == 0.625 and found["answers/compared"] == 4
    z = 1.959964
    middle, half = (0.625 + z * z / 8) / (1 + z * z / 4), z / (1 + z * z / 4) * math.sqrt(0.625 * 0.375 / 4 + z * z / 64)
    assert found["answers/win_rate_low"] == pytest.approx(middle - half)
    assert found["answers/win_rate_high"] == pytest.approx(middle + half)
    assert win_rate({1: 1.0}, {2: 1.0}) == {}


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """A model that writes and expects something else than tiny."""
    directory = shutil.copytree(builtin_directory("tiny")[0], tmp_path / "other")
    (file,) = directory.glob("*.safetensors")
    weights = {n: -value if n == "model.norm.weight" else value for n, value in load_file(file).items()}
    save_file(weights, file, {"format": "pt"})
    return directory


def test_whole_models_stand_beside_each_other(other: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With the figures that each has alone; nothing is said of tokens, which are the same."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("A list holds values.", "Four words are here.")))
    alone = [evaluate_runs([model, f"data.path={rows}"]) for model in ("tiny", str(other))]
    assert evaluate_runs(["tiny", str(other), f"data.path={rows}"]) == alone[0] | alone[1]
    assert alone[0]["tiny"]["data/loss"] != alone[1]["other"]["data/loss"]
    assert "cannot be compared" not in capsys.readouterr().out


def test_results_are_scored_on_the_same_prompts_and_kept(
    other: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": each}) + "\n" for each in ("A list?", "2 + 2?", "A colour?", "Why?")))
    (tmp_path / "worth.py").write_text("def sums(prompts, answers):\n    return [sum(map(ord, a)) % 97 for a in answers]\n")
    monkeypatch.chdir(tmp_path)
    words = ["tiny", str(other), f"data.path={prompts}", "rows=3", "max_new_tokens=6", "reward.function=worth:sums"]
    found = evaluate_runs(words)
    lines = {}
    for kept in sorted((tmp_path / "cache" / "answers").iterdir()):
        lines[kept.name] = [json.loads(line)["answers"][0] for line in kept.read_text().splitlines()]
    assert sorted(map(len, lines.values())) == [3, 3]
    means = sorted(sum(answer["score"] for answer in each) / 3 for each in lines.values())
    assert sorted(each["answers/score"] for each in found.values()) == pytest.approx(means) and means[0] != means[1]
    assert set(found) == {"tiny", "other"} and "answers/win_rate" not in found["tiny"] and found["other"]["answers/compared"] == 3
    capsys.readouterr()
    monkeypatch.setattr("posttrain.models.language.one_base.load_model", lambda *_, **__: pytest.fail("a model is loaded"))
    assert evaluate_runs(words) == found
    told = capsys.readouterr()
    assert (told.out + told.err).count("nothing to generate") == 2
    refused = 0
    for kept in (tmp_path / "cache" / "answers").iterdir():  # a file of one model's answers is none of another's
        wanted = Wanted(kept, 1, 0.0, 1.0, 6, 0, 8, most=3)
        try:
            generate(["tiny", str(prompts), "reward.function=worth:sums"], wanted)
        except UserError as error:
            refused += "made by another model" in str(error)
    assert refused == 1


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["tiny", "reward.function=f1"], "give data.path=FILE, a file of prompts"),
        (["tiny", "max_new_tokens=5"], "max_new_tokens: is about scored answers; give reward.function=NAME,NAME too"),
        (["tiny", "reward.options.f1.x=1"], "reward.options.f1.x: is about scored answers"),
        (["tiny", "tasks=gsm8k", "reward.function=f1"], "leave out tasks or reward.function"),
        (["tiny", "reward.function=f1", "max_new_tokens=many"], "max_new_tokens: 'many' is no whole number"),
        (["tiny", "reward.function=f1", "batch_size=many"], "batch_size: 'many' is no whole number above 0"),
        (["tiny", "reward.function=f1", "rows=0"], "rows: '0' is no whole number above 0"),
        (["tiny", "reward.function=f1", "max_length=5"], "max_length: is about held-out rows"),
        (["tiny", "./nowhere", "reward.function=f1", "data.path=x.jsonl"], "nowhere does not exist"),
        (["tiny", "tiny", "reward.function=f1", "data.path=x.jsonl"], "tiny is given twice"),
    ],
)
def test_bad_input(words: list[str], complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        evaluate_runs(words)


def test_counts_are_shown_as_counts(capsys: pytest.CaptureFixture[str]) -> None:
    show_evaluation({"a": {"answers/score": 0.25, "answers/scored": 1200}})
    out = capsys.readouterr().out
    assert "0.2500" in out and "1,200" in out and "1200.0" not in out
