"""The shapes that data sets come in, and the four canonical rows that they all become."""

from __future__ import annotations

import json
import math
import re
from typing import Any

from posttrain.errors import UserError, did_you_mean

Row = dict[str, Any]
Message = dict[str, Any]

SHAPES = {  # shape -> what its columns look like
    "messages": "messages or conversations, a list of {role, content}",
    "sharegpt": "conversations, a list of {from, value}",
    "alpaca": "instruction, input, output",
    "prompt_completion": "prompt and completion, prompt and response, or question and answer",
    "text": "text or content",
    "pairs": "chosen and rejected, mostly with prompt",
}
STAGE_SHAPES = {  # stage -> kinds of canonical rows that it takes
    "cpt": ("text",),
    "sft": ("messages", "prompt_completion", "text"),
    "dpo": ("pairs",),
    "rm": ("pairs",),
    "ppo": ("messages", "prompt_completion", "pairs"),
}
_HOME = {"text": "cpt", "messages": "sft", "prompt_completion": "sft", "pairs": "dpo"}
_NEEDS = {
    "cpt": "a text column",
    "sft": "messages, instruction and output, or prompt and completion",
    "dpo": "prompt, chosen and rejected",
    "rm": "prompt, chosen and rejected",
    "ppo": "prompts: messages, instruction and output, prompt and completion, or prompt, chosen and rejected",
}
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
_COMPLETIONS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))
_TURN = re.compile(r"\n\n(Human|Assistant):")


def recognise(row: Row) -> str:
    """The shape of a row, by its columns; the most specific one wins. Raises UserError if none fits."""
    if "chosen" in row or "rejected" in row:
        return "pairs"
    if name := _conversation_column(row):
        first = row[name][0] if isinstance(row[name], list) and row[name] else None
        told = [key for key in ("role", "from") if isinstance(first, dict) and key in first]
        return {"role": "messages", "from": "sharegpt"}[told[0]] if told else "messages"
    if "instruction" in row and "output" in row:
        return "alpaca"
    if any(a in row and b in row for a, b in _COMPLETIONS):
        return "prompt_completion"
    if "text" in row or "content" in row:
        return "text"
    known = "; ".join(f"{name} ({looks})" for name, looks in SHAPES.items())
    columns = ", ".join(map(str, row)) or "(none)"
    raise UserError(f"data.shape: the columns {columns} make no known shape; rename them to one of: {known}")


def check_fits(shape: str, stage: str) -> None:
    """Raises UserError if `stage` cannot train on data of `shape`."""
    kind = "messages" if shape in ("sharegpt", "alpaca") else shape
    if kind not in STAGE_SHAPES[stage]:
        raise UserError(
            f"data.path: {stage} does not take {shape} ({SHAPES[shape]}); use posttrain {_HOME[kind]}, "
            f"or give data with {_NEEDS[stage]}"
        )


def to_canonical(row: Row, shape: str, where: str) -> Row:
    """A row of `shape` as one of {"text"}, {"messages"[, "tools"]}, {"prompt", "completion"}, {"prompt", "chosen",
    "rejected"[, "margin"]}.

    Alpaca's user message is the instruction, then a line feed and the input if there is any. prompt and completion
    that are both text go on as plain text, one after the other without a template, and so do three texts of a pair;
    question and answer, prompt and response, or lists of messages become a conversation. Pairs that are whole
    transcripts share the longest run of equal messages as the prompt.

    Raises UserError, which starts with `where`, for a malformed row.
    """
    try:
        canonical = _CANONICAL[shape](row)
        return canonical if row.get("weight") is None else {**canonical, "weight": row["weight"]}
    except UserError as error:
        raise UserError(f"{where}: {error}") from error


def _conversation_column(row: Row) -> str | None:
    return next((name for name in ("messages", "conversations") if row.get(name) is not None), None) or next(
        (name for name in ("messages", "conversations") if name in row), None
    )


def _text_of(row: Row, *names: str) -> str:
    """The first of the columns that the row has, which must be text."""
    name = next((n for n in names if n in row), None)
    if name is None:
        found = ", ".join(map(str, row)) or "none"
        raise UserError(f"has no {' or '.join(names)}{did_you_mean(names[0], list(row))}; its columns are {found}")
    return _checked_text(row[name], name)


def _checked_text(value: object, name: str) -> str:
    if isinstance(value, str):
        return value
    if value is None or value != value:
        raise UserError(f"{name} is {'null' if value is None else 'NaN'}; text is needed, so fill it or drop the row")
    raise UserError(f"{name} is {type(value).__name__} where text is needed")


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
        return {
            "role": "assistant",
            "content": "",
            "tool_calls": _calls(_checked_text(item.get(said), f"{said} of {name}"), name),
        }
    calls = bool(item.get("tool_calls"))
    if said not in item and not calls:
        raise UserError(f"{name} has no {said}; its keys are {', '.join(item)}")
    content = "" if calls and item.get(said) is None else _checked_text(item[said], f"{said} of {name}")
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


def _messages(value: object, name: str) -> list[Message]:
    items = [value] if isinstance(value, dict) else value
    if not isinstance(items, list):
        raise UserError(f"{name} is {'null' if value is None else type(value).__name__}, not a list of messages")
    if not items:
        raise UserError(f"{name} is an empty conversation; drop the row")
    return [_message(item, f"{name}[{k}]") for k, item in enumerate(items)]


def _system(row: Row) -> list[Message]:
    return [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []


def _exchange(user: str, assistant: str) -> list[Message]:
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]


def _conversation(row: Row) -> Row:
    name = _conversation_column(row)
    if name is None:
        raise UserError(f"has no messages or conversations; its columns are {', '.join(map(str, row)) or 'none'}")
    found = _messages(row[name], name)
    whole = found if found[0]["role"] == "system" else [*_system(row), *found]
    _check_order(whole, name)
    tools = row.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except json.JSONDecodeError as error:
            raise UserError(f"tools is not valid JSON ({error})") from error
    return {"messages": whole, "tools": tools} if tools else {"messages": whole}


def _check_order(messages: list[Message], name: str) -> None:
    """A system message only at the beginning, then the user, and no two turns of one side without the other's between."""
    roles = [message["role"] for message in messages]
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


def _instruction(row: Row) -> str:
    instruction = _text_of(row, "instruction")
    extra = _checked_text(row["input"], "input") if row.get("input") is not None else ""
    return f"{instruction}\n{extra}" if extra.strip() else instruction


def _alpaca(row: Row) -> Row:
    user, output = _instruction(row), _text_of(row, "output")
    history = row.get("history") or []
    if not isinstance(history, list) or any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in history):
        raise UserError("history is not a list of [question, answer]")
    earlier = [m for a, b in history for m in _exchange(_checked_text(a, "history"), _checked_text(b, "history"))]
    return {"messages": [*_system(row), *earlier, *_exchange(user, output)]}


def _completion(row: Row) -> Row:
    pair = next(((a, b) for a, b in _COMPLETIONS if a in row and b in row), _COMPLETIONS[0])
    prompt, completion = (row[n] if isinstance(row.get(n), list) else _text_of(row, n) for n in pair)
    if isinstance(prompt, str) and isinstance(completion, str) and pair == _COMPLETIONS[0]:
        return {"prompt": prompt, "completion": completion}
    before = _exchange(prompt, "")[:1] if isinstance(prompt, str) else _messages(prompt, pair[0])
    after = _exchange("", completion)[1:] if isinstance(completion, str) else _messages(completion, pair[1])
    return {"messages": [*_system(row), *before, *after]}


def _plain(row: Row) -> Row:
    return {"text": _text_of(row, "text", "content")}


def _pairs(row: Row) -> Row:
    """A pair, with the `margin` by which its chosen answer is better where the row has one."""
    margin = row.get("margin")
    if margin is None:
        return _pair(row)
    if isinstance(margin, bool) or not isinstance(margin, int | float) or not math.isfinite(margin):
        raise UserError(f"margin is {margin!r}, not a finite number")
    return {**_pair(row), "margin": float(margin)}


def _pair(row: Row) -> Row:
    prompt = _pair_prompt(row)
    chosen, rejected = _pair_answer(row, "chosen"), _pair_answer(row, "rejected")
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        whole = [(prompt or "") + answer for answer in (chosen, rejected)]
        if all(map(_is_transcript, whole)):
            return _shared([_transcript(text) for text in whole])
        if prompt is not None:
            return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if prompt is None and (isinstance(chosen, str) or isinstance(rejected, str)):
        raise UserError("has chosen and rejected but no prompt, conversations, instruction or question")
    before = _exchange(prompt, "")[:1] if isinstance(prompt, str) else prompt or []
    answers = [_exchange("", a)[1:] if isinstance(a, str) else a for a in (chosen, rejected)]
    return _shared([_joined(before, answer) for answer in answers])


def _pair_prompt(row: Row) -> str | list[Message] | None:
    """Messages, a text that stands for itself, or None where the answers are whole transcripts."""
    system = _system(row)
    if row.get("prompt") is not None:
        prompt = row["prompt"]
        if not isinstance(prompt, str):
            return [*system, *_messages(prompt, "prompt")]
        return [*system, *_exchange(prompt, "")[:1]] if system else prompt
    if (name := _conversation_column(row)) and row[name] is not None:
        return [*system, *_messages(row[name], name)]
    if "instruction" in row:
        return [*system, *_exchange(_instruction(row), "")[:1]]
    if "question" in row:
        return [*system, *_exchange(_text_of(row, "question"), "")[:1]]
    return None


def _pair_answer(row: Row, name: str) -> str | list[Message]:
    return _messages(row[name], name) if isinstance(row.get(name), list | dict) else _text_of(row, name)


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


def _shared(transcripts: list[list[Message]]) -> Row:
    chosen, rejected = transcripts
    for name, messages in (("chosen", chosen), ("rejected", rejected)):
        if messages[-1]["role"] != "assistant":
            raise UserError(f"{name} ends with a message of the {messages[-1]['role']}, not with the assistant's answer")
    limit = min(len(chosen), len(rejected)) - 1
    size = next((k for k in range(limit) if chosen[k] != rejected[k]), limit)
    if not size:
        raise UserError("chosen and rejected have no first message in common, so there is no prompt")
    return {"prompt": chosen[:size], "chosen": chosen[size:], "rejected": rejected[size:]}


_CANONICAL = {
    "messages": _conversation,
    "sharegpt": _conversation,
    "alpaca": _alpaca,
    "prompt_completion": _completion,
    "text": _plain,
    "pairs": _pairs,
}
