"""Messages in either style, {role, content} or ShareGPT's {from, value}, each as {role, content} and what else it has."""

from __future__ import annotations

import json
from typing import Any

from posttrain.data.formats._columns import checked_text
from posttrain.data.formats._marks import DETAILS, MARKS, marks_of
from posttrain.data.rows import Message
from posttrain.errors import UserError, did_you_mean

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
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


def is_message(value: Any) -> bool:
    """Does it look like one? Then a list of such is a conversation, and not a list of rows."""
    return isinstance(value, dict) and ("from" in value or ("role" in value and ("content" in value or "tool_calls" in value)))


def unpacked(value: Any) -> Any:
    """What a text that is JSON of messages holds; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    first = found[0] if isinstance(found, list) and found else found
    return found if is_message(first) else value


def messages(value: Any, name: str) -> list[Message]:
    """A list of messages, or one alone, of either style, also as a text of JSON. Raises UserError, which starts with `name`, for
    what is none."""
    value = unpacked(value)
    items = [value] if isinstance(value, dict) else value
    if isinstance(items, str) and items.lstrip().startswith(("[", "{")):
        raise UserError(f"{name} is a text that is not valid JSON of messages; write it with json.dumps, not with str")
    if not isinstance(items, list):
        raise UserError(f"{name} is {'null' if value is None else type(value).__name__}, not a list of messages")
    if not items:
        raise UserError(f"{name} is an empty conversation; drop the row")
    return [_message(item, f"{name}[{k}]") for k, item in enumerate(items)]


def _message(item: Any, name: str) -> Message:
    """One message, with `role` and `content`, its marks as one `weight`; other keys stay unless they are null."""
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
        return {"role": "assistant", "content": "", "tool_calls": calls, **marks_of(item, None, name)}
    calls = bool(item.get("tool_calls") or item.get("function_call"))
    if said not in item and not calls:
        raise UserError(f"{name} has no {said}; its keys are {', '.join(item)}")
    content = "" if calls and item.get(said) is None else _content(item[said], f"{said} of {name}")
    rest = {key: value for key, value in item.items() if key not in (told, said, *MARKS, *DETAILS) and value is not None}
    if not calls:
        rest.pop("tool_calls", None)  # an empty list of them
    role = _SHAREGPT_ROLES[role] if told == "from" else "tool" if role == "function" else role  # OpenAI's name before `tool`
    return {"role": role, "content": content, **rest, **marks_of(item, item.get(said), name)}


def _content(value: Any, name: str) -> str:
    """A text, or a list of parts that are texts, end to end. Raises UserError for a part that is none, a picture above all."""
    if not isinstance(value, list):
        return checked_text(value, name)
    for part in value:
        kind = part.get("type", "text") if isinstance(part, dict) else ""
        if kind != "text" and not isinstance(part, str):
            what = f"a part of type '{kind}'" if kind else type(part).__name__
            raise UserError(f"{name} has {what}; only text can be trained on so far, so drop the row or the part")
    parts = [part if isinstance(part, str) else part.get("text", part.get("value")) for part in value]
    return "".join(checked_text(part, f"a part of {name}") for part in parts)


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
