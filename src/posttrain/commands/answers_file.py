"""The file that `posttrain generate` writes, and the rows that are made of its lines."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch

from posttrain.errors import UserError
from posttrain.rewards import best_and_worst
from posttrain.runs.files import write_text


def check_files(files: Mapping[str, Path | None]) -> None:
    """Files by what they are called, of which the first is only read. Raises UserError for one that cannot be written, or that is
    another's too."""
    seen: dict[Path, str] = {}
    for what, path in files.items():
        if path is None:
            continue
        if other := seen.get(path.resolve()):
            raise UserError(f"{what}: {path} is the file of {other} too, and would be lost; give another file")
        if seen:
            _try_to_write(path, what)
        seen[path.resolve()] = what


def _try_to_write(path: Path, what: str) -> None:
    """Nothing is left behind. Raises UserError."""
    try:
        if path.exists():
            path.open("a", encoding="utf-8").close()
        else:
            TemporaryFile(dir=next(each for each in path.absolute().parents if each.exists())).close()
    except OSError as error:
        raise UserError(f"{what}: cannot write to {path}: {error.strerror}; give another file") from None


class Answers:
    """The file of answers: whole lines, each with the key of what it was made from."""

    def __init__(self, path: Path, keys: list[str]) -> None:
        """Raises UserError where the file holds what was made from something else."""
        self.path, self.keys, self.lines = path, keys, dict[str, dict[str, Any]]()
        wanted = set(keys)
        if not path.exists():
            return
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # what was being written when it was stopped is no line
        for number, line in enumerate(whole.split("\n")[:-1], 1):
            try:
                found = json.loads(line)
                known = found["key"] in wanted
            except (ValueError, KeyError, TypeError):
                raise UserError(f"--to: line {number} of {path} is no answer of posttrain generate; give another file") from None
            if not known:
                raise UserError(f"--to: line {number} of {path} was made by another model, prompt or setting; give another file")
            self.lines[found["key"]] = found
        if whole != text:
            write_text(path, whole)

    def add(self, lines: list[dict[str, Any]]) -> None:
        """Lines that are not there yet, on the disk at once."""
        new = [line for line in lines if line["key"] not in self.lines]
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in new))
        self.lines |= {line["key"]: line for line in new}

    def in_order(self) -> list[dict[str, Any]]:
        """Of the prompts."""
        return [self.lines[key] for key in self.keys]


def _with_tools(line: dict[str, Any]) -> dict[str, Any]:
    return {"prompt": line["prompt"]} | ({"tools": line["tools"]} if "tools" in line else {})


def best_rows(lines: list[dict[str, Any]], at_least: float | None) -> list[dict[str, Any]]:
    """{prompt, completion} of each prompt's best answer, the first of equals; none of a prompt whose best is below `at_least`."""
    found = []
    for line in lines:
        scored = [answer for answer in line["answers"] if answer.get("score") is not None]
        best = max(scored, key=lambda answer: answer["score"], default=None)
        if best and (at_least is None or best["score"] >= at_least):
            found.append(_with_tools(line) | {"completion": best["text"]})
    return found


def pair_rows(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """{prompt, chosen, rejected} of each prompt's best and worst answer; none where no answer is better than another."""
    found = []
    for line in lines:
        scores = torch.tensor([float("nan") if (s := answer.get("score")) is None else s for answer in line["answers"]])
        if chosen := best_and_worst(scores):
            best, worst = (line["answers"][i]["text"] for i in chosen)
            found.append(_with_tools(line) | {"chosen": best, "rejected": worst})
    return found
