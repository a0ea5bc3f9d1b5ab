"""Conversations in either style of message, {role, content} or ShareGPT's {from, value}, and what is checked of them."""

from __future__ import annotations

import json
from typing import Any

from posttrain.data.formats._columns import checked_text, columns_of, system_of
from posttrain.data.rows import CanonicalRow, Message, Row
from posttrain.errors import UserError, did_you_mean

COLUMNS = ("messages", "conversations")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "system": "system",
    "tool": "tool",
    "function_response": "tool",
    "observation": "tool",
    "function_call": "assistant",
}


def conversation_column(row: Row) -> str | None:
    """The column that holds a conversation, one that is not null before one that is; None without such a column."""
    there = [name for name in COLUMNS if name in row]
    return next((name for name in there if row[name] is not None), there[0] if there else None)


def first_message(row: Row) -> Any:
    """The first item of the row's conversation, whatever it is; None without any."""
    name = conversation_column(row)
    return row[name][0] if name and isinstance(row[name], list) and row[name] else None


def conversation(row: Row) -> CanonicalRow:
    """A row with a conversation of either style as {"messages"[, "tools"]}; a column `system` comes first."""
    name = conversation_column(row)
    if name is None:
        raise UserError(f"has no messages or conversations; its columns are {columns_of(row)}")
    found = messages(row[name], name)
    whole = found if found[0]["role"] == "system" else [*system_of(row), *found]
    _check_order(whole, name)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"tools is not valid JSON ({error})") from error
    return {"messages": whole, "tools": tools} if tools else {"messages": whole}


def messages(value: object, name: str) -> list[Message]:
    """A list of messages, or one alone, of either style. Raises UserError, which starts with `name`, for what is none."""
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise UserError(f"{name} is {'null' if value is None else type(value).__name__}, not a list of messages")
    if not items:
        raise UserError(f"{name} is an empty conversation; drop the row")
    return [_message(item, f"{name}[{k}]") for k, item in enumerate(items)]


def _message(item: object, name: str) -> Message:
    """One message of either style, with `role` and `content`; other keys stay unless they are null."""
    if not isinstance(item, dict):
        raise UserError(f"{name} is {type(item).__name__}, not an object with role and content")
    told, said = ("from", "value") if "from" in item and "role" not in item else ("role", "content")
    known = [*(_SHAREGPT_ROLES if told == "from" else _ROLES)]
    if told not in item:
        raise UserError(f"{name} has no role; its keys are {', '.join(item) or 'none'}")
    role = item[told]
    if role not in known:
        raise UserError(f"{name} has the unknown role {role!r}{did_you_mean(str(role), known)}; known: {', '.join(known)}")
    if role == "function_call" and told == "from":
        calls = _calls(checked_text(item.get(said), f"{said} of {name}"), name)
        return {"role": "assistant", "content": "", "tool_calls": calls}
    calls = bool(item.get("tool_calls"))
    if said not in item and not calls:
        raise UserError(f"{name} has no {said}; its keys are {', '.join(item)}")
    content = "" if calls and item.get(said) is None else checked_text(item[said], f"{said} of {name}")
    rest = {key: value for key, value in item.items() if key not in (told, said) and value is not None}
    return {"role": _SHAREGPT_ROLES[role] if told == "from" else role, "content": content, **rest}


def _calls(text: str, name: str) -> list[Message]:
    """What ShareGPT writes as the value of a `function_call`: a name with its arguments in JSON, or a list of such."""
    try:
        given = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise UserError(f"{name} is a function_call whose value is not valid JSON ({error})") from error
    calls = given if isinstance(given, list) else [given]
    if not calls or not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise UserError(f"{name} is a function_call without the name of a function")
    return [{"type": "function", "function": {"name": c["name"], "arguments": c.get("arguments", {})}} for c in calls]


def _check_order(whole: list[Message], name: str) -> None:
    """A system message only at the beginning, then the user, and no two turns of one side without the other's between."""
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
