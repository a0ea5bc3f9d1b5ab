"""Columns that hold a conversation, its tools, and the order of its turns."""

from __future__ import annotations

import json
from typing import Any

from posttrain.data.formats._columns import columns_of, system_of
from posttrain.data.formats._messages import messages, unpacked
from posttrain.data.rows import REASONING, CanonicalRow, Message, Row
from posttrain.errors import UserError

COLUMNS = ("messages", "conversations")


def conversation_column(row: Row) -> str | None:
    """The column that holds a conversation, one that is not null before one that is; None without such a column."""
    there = [name for name in COLUMNS if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def first_message(row: Row) -> Any:
    """The first item of the row's conversation, whatever it is; None without any."""
    name = conversation_column(row)
    found = unpacked(row[name]) if name else None
    return found[0] if isinstance(found, list) and found else None


def conversation(row: Row) -> CanonicalRow:
    """A row with a conversation of either style as {"messages"[, "tools"]}; a column `system` comes first."""
    name = conversation_column(row)
    if name is None:
        raise UserError(f"has no messages or conversations; its columns are {columns_of(row)}")
    found = messages(row[name], name)
    whole = found if found[0]["role"] == "system" else [*system_of(row), *found]
    check_order(whole, name)
    return {"messages": whole, **tools_of(row)}


def tools_of(row: Row) -> CanonicalRow:
    """{"tools": ...} of a row with a column of that name, or `functions` (OpenAI's earlier one), also as a text of JSON; nothing
    where it is empty."""
    name = "functions" if row.get("tools") in (None, "", []) and row.get("functions") else "tools"
    tools = row.get(name)
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"{name} is not valid JSON ({error})") from error
    return {"tools": tools} if tools else {}


def continued(before: list[Message], answer: list[Message], name: str) -> tuple[list[Message], int]:
    """A prompt and the answer that follows it as one conversation, and how many of its messages are before the answer.

    An answer that begins with the system or the user is the whole transcript, and goes on where the prompt ends; only after the
    assistant's own turn may the user's be the next. An answer of the assistant's behind an assistant's message goes on with that
    one. Raises UserError, which starts with `name`, for a prompt that the transcript does not hold, and for turns out of order.
    """
    opens = answer[0]["role"]
    goes_on = opens not in ("system", "developer", "user")
    if opens == "user" and before and before[-1]["role"] == "assistant":
        goes_on = not _same(answer[0], next(m for m in before if m["role"] != "system"))
    if goes_on or not before:
        begun = bool(before) and opens == before[-1]["role"] == "assistant"
        first = len(before) - begun
        whole = [*before[:first], _joined(before[-1], answer[0], name), *answer[1:]] if begun else [*before, *answer]
    else:
        whole, first = _found(before, answer, name)
    check_order(whole, name)
    return whole, first


def _found(before: list[Message], answer: list[Message], name: str) -> tuple[list[Message], int]:
    """A transcript, and where in it the prompt ends."""
    opens, first = answer[0]["role"], 0
    whole = [*(before[:1] if before[0]["role"] == "system" and opens != "system" else []), *answer]
    for message in before:
        place = next((k for k, m in enumerate(whole[first:], first) if _same(m, message)), -1)
        begun = first < len(whole) and message is before[-1] and message["role"] == whole[first]["role"] == "assistant"
        if place < 0 and begun and whole[first]["content"].startswith(message["content"]):
            whole[first] = _joined(message, whole[first], name)
            return whole, first
        if place < 0:
            said = message["content"].strip()[:40]
            raise UserError(f"{name} is a whole transcript without the prompt's message {said!r}; drop the prompt or the row")
        first = place + 1
    return whole, first


def _joined(prefill: Message, answer: Message, name: str) -> Message:
    """One message of a prefill and the answer that goes on behind it, or holds its words itself."""
    before, given = prefill["content"], answer["content"]
    if thought := next((key for key in REASONING if answer.get(key)), None):
        raise UserError(f"{name} goes on behind {before.strip()[:40]!r} and cannot begin with {thought}; drop one of the two")
    if prefill.get("tool_calls"):
        raise UserError(f"{name} goes on behind an assistant's message that calls tools; put their results between the two")
    shift = 0 if given.startswith(before) else len(before)
    moved = {"trained": [[a + shift, b + shift] for a, b in answer["trained"]]} if "trained" in answer else {}
    kept = {key: value for key, value in prefill.items() if key not in ("weight", "train", "trained")}
    return kept | answer | {"content": before[:shift] + given, **moved, "prefill": len(before)}


def _same(message: Message, other: Message) -> bool:
    """Do both say the same, but for white space around it?"""
    return message["role"] == other["role"] and message["content"].strip() == other["content"].strip()


def check_order(whole: list[Message], name: str) -> None:
    """Raises UserError unless a system message stands only at the beginning, then the user's, and no two turns of one side
    without the other's between."""
    roles = [message["role"] for message in whole]
    turns = roles[1:] if roles[0] in ("system", "developer") else roles
    before = ""
    for k, role in enumerate(turns, len(roles) - len(turns)):
        if role in ("system", "developer"):
            raise UserError(f"{name}[{k}] is a {role} message, which stands at the beginning only")
        if role == before and role != "tool":
            raise UserError(f"{name}[{k}] is the {role}'s turn a second time; join the two, or drop the row")
        if not before and role != "user":
            raise UserError(f"{name}[{k}] is the {role}'s, where a conversation begins with the user's")
        before = role
