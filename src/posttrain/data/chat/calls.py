"""Tool calls and tools in the forms that people have them, and the form in which a template wants them."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, NamedTuple

from posttrain.data.chat.marks import with_content
from posttrain.data.rows import Message
from posttrain.errors import UserError


class CallForm(NamedTuple):
    """How calls are handed to a template. nested: below `function`, as OpenAI has them. as_text: arguments as JSON."""

    nested: bool
    as_text: bool


# A template that writes arguments as they are, if they are text, and as JSON otherwise, wants the object.
CALL_FORMS = (CallForm(True, False), CallForm(True, True), CallForm(False, False), CallForm(False, True))


def plain(message: Message) -> Message:
    """Without absent fields, its content one string, its calls below `function` with arguments as objects."""
    found = {name: value for name, value in message.items() if value is not None and (name != "tool_calls" or value)}
    if "content" in found and not isinstance(found["content"], str):
        found["content"] = _joined(found["content"], message["role"])
    if isinstance(call := found.pop("function_call", None), dict):  # as OpenAI had one call before it had several
        found["tool_calls"] = [*found.get("tool_calls", []), call]
    if "tool_calls" in found:
        found["tool_calls"] = [_call(call, k) for k, call in enumerate(found["tool_calls"], 1)]
        found.setdefault("content", "")
    return found


def listed(tools: list[Any] | None) -> list[Any] | None:
    """Tools as OpenAI has them; None where there is none."""
    return [
        tool if "function" in tool or "name" not in tool else {"type": "function", "function": tool} for tool in tools or []
    ] or None


def in_form(message: Message, form: CallForm) -> Message:
    """A `plain` message with its calls as a template wants them."""
    if "tool_calls" not in message:
        return message
    calls = []
    for call in message["tool_calls"]:
        function = call["function"]
        if form.as_text:
            function = function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}
        rest = {name: value for name, value in call.items() if name != "function"}
        calls.append(rest | ({"function": function} if form.nested else function))
    return message | {"tool_calls": calls}


def leaves_replaced(value: Any, replace: Callable[[str], str]) -> Any:
    """The value with another text in place of each that it holds; keys stay."""
    if isinstance(value, dict):
        return {key: leaves_replaced(each, replace) for key, each in value.items()}
    if isinstance(value, list):
        return [leaves_replaced(each, replace) for each in value]
    return replace(value) if isinstance(value, str) else value


def numbers_in(value: Any) -> set[tuple[str, ...]]:
    """What is no text in a value, each as the ways to write it."""
    if isinstance(value, dict | list):
        return {ways for each in (value.values() if isinstance(value, dict) else value) for ways in numbers_in(each)}
    return set() if isinstance(value, str) else {(json.dumps(value), str(value))}


def _joined(parts: Any, role: str) -> str:
    texts = [part if isinstance(part, str) else _text_of(part) for part in parts] if isinstance(parts, list) else [None]
    if any(text is None for text in texts):
        raise UserError(f"the content of a '{role}' message is neither a text nor a list of texts")
    return "".join(text for text in texts if text is not None)


def _text_of(part: Any) -> str | None:
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") == "text" else None
    return text if isinstance(text, str) else None


def _call(call: Any, number: int) -> dict[str, Any]:
    if not isinstance(call, dict):
        raise UserError(f"tool call {number} is {type(call).__name__}, not an object with a name and arguments")
    function = call.get("function", call)
    if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
        raise UserError(f"tool call {number} has no name")
    rest = {k: v for k, v in call.items() if k not in ("function", "name", "arguments", "parameters") and v is not None}
    arguments = function.get("arguments", function.get("parameters"))
    others = (
        {k: v for k, v in function.items() if k not in ("arguments", "parameters")}
        if "function" in call
        else {"name": function["name"]}
    )
    return {"type": "function", **rest, "function": {**others, "arguments": _object(arguments, function["name"])}}


def _object(arguments: Any, name: str) -> dict[str, Any]:
    """Arguments as an object, which may be written in JSON, as OpenAI does."""
    given = arguments
    if isinstance(arguments, str):
        try:
            given = json.loads(arguments) if arguments.strip() else {}
        except (json.JSONDecodeError, RecursionError) as error:
            raise UserError(f"the arguments of the call of {name} are not valid JSON ({error}): {arguments[:60]!r}") from error
    if given is None:
        return {}
    if not isinstance(given, dict):
        raise UserError(f"the arguments of the call of {name} are {type(given).__name__}, not an object of names and values")
    return given


_SYSTEM = """\
You may call these functions, one JSON object a line:
<tools>
{tools}
</tools>
To call one, write <tool_call>
{{"name": NAME, "arguments": OBJECT}}
</tool_call>"""


def inlined(messages: list[Message], tools: list[Any] | None) -> tuple[list[Message], None]:
    """`plain` messages for a template that knows no tools: these stand in the first message's content, calls in the assistant's,
    and results in the user's, all in the tags that Hermes introduced."""
    found: list[Message] = []
    for k, message in enumerate(messages):
        if message["role"] == "tool" and k and messages[k - 1]["role"] == "tool":
            found[-1] = found[-1] | {"content": f"{found[-1]['content']}\n{_result(message)}"}
        elif message["role"] == "tool":
            found.append({"role": "user", "by": "tool", "content": _result(message)})
        else:
            found.append(_with_calls(message))
    if tools:
        text = _SYSTEM.format(tools="\n".join(json.dumps(tool, ensure_ascii=False) for tool in listed(tools) or []))
        said = found[0].get("content", "")
        found[0] = with_content(found[0], f"{said}\n\n{text}" if found[0]["role"] == "system" else f"{text}\n\n{said}")
    return found, None


def _result(message: Message) -> str:
    return f"<tool_response>\n{message.get('content', '')}\n</tool_response>"


def _with_calls(message: Message) -> Message:
    if "tool_calls" not in message:
        return message
    functions = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
    said = [message.get("content", ""), *(f"<tool_call>\n{function}\n</tool_call>" for function in functions)]
    rest = {name: value for name, value in message.items() if name != "tool_calls"}
    return with_content(rest, "\n".join(text for text in said if text))
