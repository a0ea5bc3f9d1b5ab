"""Questions, and the file of their answers: it composes to what was answered, and says what comes next."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from posttrain.commands import new
from posttrain.commands.new import new_config
from posttrain.config.compose import compose_run
from posttrain.errors import UserError

NO = {"memory": "skip"}


def composed(stage: str, path: Path) -> dict[str, Any]:
    return compose_run(stage, [f"--config={path}"])


def test_questions_become_a_file_that_composes(tmp_path: Path) -> None:
    asked: list[tuple[str, str]] = []
    answers = iter(["tiny", "chat: mine.jsonl", "", "skip"])

    def ask(text: str, default: str) -> str:
        asked.append((text.split("?")[0], default))
        return next(answers)

    path = new_config("sft", {}, [], tmp_path / "my.yaml", ask)
    whats = [("Which model", "smollm2"), ("Which data", ""), ("What is trained", "lora")]
    assert asked == [*whats, ("How much memory has the device", "auto")]
    config = composed("sft", path)
    assert (config["model"]["name"], config["data"]["path"], config["peft"]["method"]) == ("tiny", "chat: mine.jsonl", "lora")
    said = path.read_text()
    assert yaml.safe_load(said) == {"model": "tiny", "data.path": "chat: mine.jsonl", "peft": "lora"}
    assert "# optim.lr: 0.0002" in said and "# train.epochs: 1 " in said and f"posttrain sft --config {path}" in said


def test_every_comment_that_is_a_setting_composes(tmp_path: Path) -> None:
    """What one would uncomment is the default, and no word that the stage does not know."""
    path = new_config("dpo", {**NO, "model": "tiny"}, [], tmp_path / "a.yaml", None)
    before = composed("dpo", path)
    lines = path.read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if "What one changes next" in line)
    path.write_text("\n".join([*lines[: start + 1], *(line.removeprefix("# ") for line in lines[start + 1 :])]))
    after = composed("dpo", path)
    assert after["optim"].pop("lr") == pytest.approx(before["optim"].pop("lr"))
    assert after == before and len(lines) - start > 8


def test_without_questions_the_defaults_hold_and_words_win(tmp_path: Path) -> None:
    words = ["optim.lr=1e-5", "reward.function=exact", "train.max_steps=7"]
    path = new_config("ppo", {**NO, "model": "Org/Some-Model", "peft": "qlora"}, words, tmp_path / "a.yaml", None)
    config = composed("ppo", path)
    assert config["model"]["name"] == "Org/Some-Model" and config["quant"]["method"] == "nf4"
    assert (config["optim"]["lr"], config["reward"]["function"], config["train"]["max_steps"]) == (1e-5, "exact", 7)


def test_what_does_not_fit_is_made_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    changes = [{"override": "train.batch_size=9", "fits": False}, {"override": "train.batch_size=1 peft=qlora", "fits": True}]
    plan = {"fits": False, "total_bytes": 2**31, "changes": changes}
    asked: list[Any] = []
    monkeypatch.setattr("posttrain.commands.plan.plan.make_plan", lambda *words: asked.append(words) or plan)
    path = new_config("sft", {"model": "tiny", "memory": "1GB"}, [], tmp_path / "a.yaml", None)
    assert asked == [("sft", ["model=tiny", "peft=lora"], 10**9)]
    config = composed("sft", path)
    assert (config["train"]["batch_size"], config["peft"]["method"], config["quant"]["method"]) == (1, "qlora", "nf4")
    assert "train.batch_size: 1" in path.read_text() and "so that it fits in memory" in path.read_text()
    assert "needs about 2.00 GiB, which does not fit: taken over train.batch_size=1 peft=qlora" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("stage", "given", "said"),
    [
        ("sftt", NO, "sft"),
        ("sft", {**NO, "peft": "lorra"}, "did you mean 'lora'"),
        ("dreambooth", {**NO, "model": "tiny"}, "data.instance_dir: it has no default"),
        ("sft", {"model": "tiny", "data.path": "nowhere.jsonl"}, "nowhere.jsonl"),
        ("sft", {"model": "tiny", "memory": "much"}, "--memory"),
    ],
)
def test_what_is_wrong_leaves_no_file(tmp_path: Path, stage: str, given: dict[str, str | None], said: str) -> None:
    with pytest.raises(UserError, match=said):
        new_config(stage, given, [], tmp_path / "a.yaml", None)
    assert not (tmp_path / "a.yaml").exists()


def test_a_file_that_is_there_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(json.dumps({}))
    with pytest.raises(UserError, match="is there already"):
        new_config("sft", NO, [], path, None)
    assert path.read_text() == "{}"


def test_nobody_there_to_ask(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    with pytest.raises(UserError, match=r"there is no terminal to ask on.*--yes"):
        new.question_on_terminal()
