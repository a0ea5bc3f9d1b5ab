"""Preferences: two answers to one prompt, the first of them better, as texts, messages or whole transcripts."""

from __future__ import annotations

import math
import re

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, instruction_of, system_of, text_of
from posttrain.data.formats._conversations import conversation_column, messages
from posttrain.data.rows import CanonicalRow, Message, Row
from posttrain.errors import UserError

_TURN = re.compile(r"\n\n(Human|Assistant):")


def _to_canonical(row: Row) -> CanonicalRow:
    """A pair, with the `margin` by which its chosen answer is better where the row has one. Three texts go on as plain text;
    pairs that are whole transcripts share the longest run of equal messages as the prompt."""
    margin = row.get("margin")
    if margin is None:
        return _pair(row)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"margin is {margin!r}, not a finite number")
    return {**_pair(row), "margin": float(margin)}


def _pair(row: Row) -> CanonicalRow:
    prompt = _prompt(row)
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        whole = [(prompt or "") + answer for answer in (chosen, rejected)]
        if all(map(_is_transcript, whole)):
            return _shared([_transcript(text) for text in whole])
        if prompt is not None:
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise UserError("has chosen and rejected but no prompt, conversations, instruction or question")
    before = exchange(prompt, "")[:1] if isinstance(prompt, str) else prompt or []
    answers = [exchange("", a)[1:] if isinstance(a, str) else a for a in (chosen, rejected)]
    return _shared([_joined(before, answer) for answer in answers])


def _prompt(row: Row) -> str | list[Message] | None:
    """Messages, a text that stands for itself, or None where the answers are whole transcripts."""
    system = system_of(row)
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            return [*system, *messages(prompt, "prompt")]
        return [*system, *exchange(prompt, "")[:1]] if system else prompt
    if (name := conversation_column(row)) and row[name] is not None:
        return [*system, *messages(row[name], name)]
    if "instruction" in row:
        return [*system, *exchange(instruction_of(row), "")[:1]]
    if "question" in row:
        return [*system, *exchange(text_of(row, "question"), "")[:1]]
    return None


def _answer(row: Row, name: str) -> str | list[Message]:
    return messages(row[name], name) if isinstance(row.get(name), list | dict) else text_of(row, name)


def _joined(before: list[Message], answer: list[Message]) -> list[Message]:
    """The answer after its prompt, unless it repeats the prompt already."""
    return answer if all(message in answer for message in before) else [*before, *answer]


def _is_transcript(text: str) -> bool:
    return text.lstrip().startswith("Human:")


def _transcript(text: str) -> list[Message]:
    """Anthropic HH's '\\n\\nHuman: ... \\n\\nAssistant: ...' (Bai et al. 2022) as messages."""
    _, *parts = _TURN.split("\n\n" + text.lstrip())
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _shared(transcripts: list[list[Message]]) -> CanonicalRow:
    chosen, rejected = transcripts
    for name, answer in (("chosen", chosen), ("rejected", rejected)):
        if answer[-1]["role"] != "assistant":
            raise UserError(f"{name} ends with a message of the {answer[-1]['role']}, not with the assistant's answer")
    limit = min(len(chosen), len(rejected)) - 1
    size = next((k for k in range(limit) if chosen[k] != rejected[k]), limit)
    if not size:
        raise UserError("chosen and rejected have no first message in common, so there is no prompt")
    return {"prompt": chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}


FORMAT = Format(
    columns="chosen and rejected, mostly with prompt",
    kind="pairs",
    precedence=60,
    recognises=lambda row: "chosen" in row or "rejected" in row,
    to_canonical=_to_canonical,
    example={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 1},
    example_becomes={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 1.0},
)
