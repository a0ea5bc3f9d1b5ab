"""Data sets that every installation has: Python's reference, questions and preferences about it, and general prose."""

from __future__ import annotations

import re
from functools import cache
from importlib import resources
from typing import Any

from posttrain.data.sources.builtin.objects import place
from posttrain.data.sources.builtin.questions import preference_rows, question_rows
from posttrain.errors import UserError, did_you_mean

PARTS = {
    "reference": ("train", "eval"),
    "questions": ("train", "eval"),
    "preferences": ("train", "eval"),
    "general": ("eval",),
}
_HELD_OUT_TOPICS = 0.12  # share of the topics
_LONG_PARAGRAPH = 80  # letters; what is longer is in one part only, and there once
_RULE = re.compile(r"[*=~^-]{3,}")
_WRAPPED = 50  # letters; a line that ends earlier was ended on purpose


@cache
def builtin_rows(name: str, part: str) -> list[dict[str, Any]]:
    """Canonical rows of `builtin:NAME`, always the same for one version of Python; part is train or eval.

    reference: the language reference, a document a topic. questions: one-turn conversations about the standard
    library. preferences: pairs of a right and a poor answer about other objects of it. general: plain prose, for
    evaluation only. Raises UserError for an unknown name, and for a part that the set does not have.
    """
    require_builtin(name, part)
    if name == "questions":
        return question_rows(part)
    if name == "preferences":
        return preference_rows(part)
    if name == "general":
        text = resources.files("posttrain.data.sources.builtin").joinpath("general.txt").read_text("utf-8")
        return [{"text": " ".join(paragraph.split())} for paragraph in text.strip().split("\n\n")]
    return _reference(part)


def require_builtin(name: str, part: str | None) -> None:
    """Raises UserError for an unknown name, and for a part that the set does not have. part: None: any."""
    if name not in PARTS:
        raise UserError(f"data.path: no built-in data '{name}'{did_you_mean(name, list(PARTS))}; there are {', '.join(PARTS)}")
    if part is not None and part not in PARTS[name]:
        instead = "; it is for evaluation only, so name it under eval.sets" if name == "general" else ""
        raise UserError(f"data.path: builtin:{name} has no part '{part}', only {' and '.join(PARTS[name])}{instead}")


def _reference(part: str) -> list[dict[str, Any]]:
    """Held-out topics whole; of the others, what no held-out topic and no topic before says."""
    from pydoc_data.topics import topics

    kept: dict[str, list[dict[str, Any]]] = {"eval": [], "train": []}
    seen: set[str] = set()
    for topic in sorted(topics, key=lambda topic: (place(topic) >= _HELD_OUT_TOPICS, place(topic))):
        side = "eval" if place(topic) < _HELD_OUT_TOPICS else "train"
        paragraphs = []
        for paragraph in _paragraphs(topics[topic]):
            key = " ".join(paragraph.split())
            if side == "eval" or key not in seen:
                paragraphs.append(paragraph)
            if len(key) >= _LONG_PARAGRAPH:
                seen.add(key)
        if sum(map(len, paragraphs)) >= 200:  # what is left of a topic that others say already is headings
            kept[side].append({"text": "\n\n".join(paragraphs)})
    return kept[part]


def _paragraphs(text: str) -> list[str]:
    """Paragraphs without the rules under headings, each prose one on a single line; code and grammar as they are."""
    blocks = re.split(r"\n[^\S\n]*\n", text.strip("\n"))
    lines = [
        [line.rstrip() for line in block.split("\n") if line.strip() and not _RULE.fullmatch(line.strip())] for block in blocks
    ]
    return [_unwrapped(block) for block in lines if block and "[ Footnotes ]" not in block[0]]


def _unwrapped(lines: list[str]) -> str:
    wrapped = all(len(line) >= _WRAPPED for line in lines[:-1])
    verbatim = any(sign in line for line in lines for sign in ("::=", ">>>", " | ", "+--"))
    return " ".join(" ".join(lines).split()) if wrapped and not verbatim and len(lines) > 1 else "\n".join(lines)
