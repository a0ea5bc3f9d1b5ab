"""Preferences: two answers to one prompt, the first of them better, as texts, messages or whole transcripts."""

from __future__ import annotations

import math
import re

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, history_of, instruction_of, system_of, text_of
from posttrain.data.formats._conversations import continued, conversation_column, tools_of
from posttrain.data.formats._messages import messages, unpacked
from posttrain.data.rows import CanonicalRow, Message, Row
from posttrain.errors import UserError

_REJECTED = ("rejected_response", "rejected_messages")  # of ms-swift
_TURN = re.compile(r"\n\n(Human|Assistant):")


def _to_canonical(row: Row) -> CanonicalRow:
    """A pair, with the `margin` by which its chosen answer is better where the row has one. Three texts go on as plain text;
    pairs that are whole transcripts share the longest run of equal messages as the prompt."""
    margin = row.get("margin")
    pair = _pair(_of_swift(row) or row)
    if margin is None:
        return pair
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"margin is {margin!r}, not a finite number")
    return {**pair, "margin": float(margin)}


def _of_swift(row: Row) -> Row | None:
    """What ms-swift writes as a conversation (or query and response) with another answer to it, as chosen and rejected."""
    name = next((name for name in _REJECTED if name in row), None)
    if name is None:
        return None
    others = {key: row.get(key) for key in ("system", "tools")}
    column = conversation_column(row)
    if column is None:
        given = {"query": text_of(row, "query"), "history": row.get("history"), "chosen": text_of(row, "response")}
        return {**others, **given, "rejected": row[name]}
    chosen = messages(row[column], column)
    prompt = {"prompt": chosen[:-1]} if name == "rejected_response" else {}
    return {**others, **prompt, "chosen": chosen[-1:] if prompt else chosen, "rejected": row[name]}


def _pair(row: Row) -> CanonicalRow:
    chosen, rejected = _answer(row, "chosen"), _answer(row, "rejected")
    transcripts = all(isinstance(a, list) and a[0]["role"] in ("system", "developer", "user") for a in (chosen, rejected))
    prompt, tools = _prompt(row, transcripts), tools_of(row)
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        whole = [(prompt or "") + answer for answer in (chosen, rejected)]
        if all(map(_is_transcript, whole)):
            return _shared([_transcript(text) for text in whole])
        if prompt is not None and not tools:
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise UserError("has chosen and rejected but no prompt, conversations, instruction or question")
    before = exchange(prompt, "")[:1] if isinstance(prompt, str) else prompt or []
    answers = {"chosen": chosen, "rejected": rejected}
    listed = {name: exchange("", a)[1:] if isinstance(a, str) else a for name, a in answers.items()}
    _check_prefill(before, listed)
    return _shared([continued(before, answer, name)[0] for name, answer in listed.items()]) | tools


def _check_prefill(before: list[Message], answers: dict[str, list[Message]]) -> None:
    """Raises UserError where the prompt begins the answers, and one of them has that beginning itself and the other has not."""
    begun = before[-1]["content"] if before and before[-1]["role"] == "assistant" else ""
    holds = {name: answer[0]["content"].startswith(begun) for name, answer in answers.items() if answer[0]["role"] == "assistant"}
    if begun and len(set(holds.values())) > 1:
        one, other = sorted(holds, key=lambda name: not holds[name])
        raise UserError(f"{one} begins with {begun.strip()[:40]!r}, as the prompt ends, and {other} does not; write both alike")


def _prompt(row: Row, transcripts: bool) -> str | list[Message] | None:
    """Messages, a text that stands for itself, or None where the answers are whole transcripts."""
    before = [*system_of(row), *history_of(row)]
    if row.get("prompt") is not None:
        prompt = unpacked(row["prompt"])
        if not isinstance(prompt, str):
            return [*before, *messages(prompt, "prompt")]
        return [*before, *exchange(prompt, "")[:1]] if before else prompt
    if not transcripts and (name := conversation_column(row)) and row[name] is not None:
        return [*before, *messages(row[name], name)]
    if "instruction" in row:
        return [*before, *exchange(instruction_of(row), "")[:1]]
    if name := next((name for name in ("question", "query") if name in row), None):
        return [*before, *exchange(text_of(row, name), "")[:1]]
    return None


def _answer(row: Row, name: str) -> str | list[Message]:
    value = unpacked(row.get(name))
    return messages(value, name) if isinstance(value, list | dict) else text_of(row, name)


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
    recognises=lambda row: any(name in row for name in ("chosen", "rejected", *_REJECTED)),
    to_canonical=_to_canonical,
    example={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 1},
    example_becomes={"prompt": "2 + 2 =", "chosen": " 4", "rejected": " 5", "margin": 1.0},
)
