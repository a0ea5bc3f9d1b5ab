"""docs/first-hour.md, command by command, with the files that it shows and model=tiny in place of the real one."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from posttrain.cli import app

PAGE = (Path(__file__).parents[1] / "docs" / "first-hour.md").read_text(encoding="utf-8")


def parts(text: str) -> Iterator[tuple[str, str]]:
    """("`rows.jsonl`:", its lines) for each file, ("", a line) for each other line that is set off."""
    name = ""
    for block in re.split(r"\n{2,}(?! {4}|\n)", text):
        head, _, body = block.partition("\n\n    ")
        if file := re.fullmatch(r"`([\w.]+)`:", head.strip()):
            yield file[1], "".join(f"{line[4:]}\n" for line in f"    {body}".split("\n"))
        else:
            for line in block.splitlines():
                if line.startswith("    "):
                    yield name, line.strip()


def commands(text: str) -> list[list[str]]:
    return [shlex.split(line)[1:] for name, line in parts(text) if not name and line.startswith("posttrain ")]


def test_the_page_is_read_as_it_is_meant() -> None:
    files = [name for name, _ in parts(PAGE) if name]
    assert files == ["rows.jsonl", "pairs.jsonl", "chain.yaml", "brief.py", "prompts.jsonl"]
    lines = next(body for name, body in parts(PAGE) if name == "rows.jsonl").splitlines()
    assert len([json.loads(line) for line in lines]) == 8
    assert [words[0] for words in commands(PAGE)] == [
        "preview", "plan", "sft", "chat", "export", "merge", "dpo", "eval", "report", "run", "ppo", "generate",
    ]  # fmt: skip


@pytest.mark.slow
def test_every_command_of_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    for name, text in parts(PAGE):
        text = text.replace("model=smollm2", "model=tiny")
        if name:
            (tmp_path / name).write_text(text, encoding="utf-8")
        elif text.startswith("posttrain "):
            done = CliRunner().invoke(app, shlex.split(text)[1:])
            assert done.exit_code == 0, f"{text}\n{done.output}"
    for left in ("runs/support/report.html", "support-model/model.safetensors", "runs/polite/manifest.json", "answers.jsonl"):
        assert (tmp_path / left).is_file(), left
    assert len((tmp_path / "answers.jsonl").read_text().splitlines()) == 6
    assert any((tmp_path / "support-gguf").glob("*.gguf"))
