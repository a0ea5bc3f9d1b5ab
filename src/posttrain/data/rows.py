"""What a row is: as it is read, and as every data format leaves it; and what is asked of the latter."""

from __future__ import annotations

from typing import Any

from posttrain.errors import UserError

Row = dict[str, Any]  # as it is read: its columns by name
Message = dict[str, Any]  # of a conversation: role, content, perhaps tool_calls, weight, and marks (data/chat/marks.py)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names under which a message may carry its reasoning
# {"text"}, {"messages"}, {"prompt", "completion"}, {"prompt", "chosen", "rejected"[, "margin"]} or {"prompt"}; messages also with
# "tools", an answer with a "label" (false: not to be learnt); each perhaps with a "weight" of its own, "chat_template_kwargs"
# (variables of the chat template), "first" (see ChatOptions), and "columns", all that its format has not taken from the row
CanonicalRow = dict[str, Any]


def prompt_of(row: CanonicalRow) -> list[Message]:
    """A canonical row's conversation without the answer that it ends with. Raises UserError where nothing is left, and where the
    prompt ends with the answer's beginning."""
    prompt = row.get("messages", row.get("prompt"))
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt or [])
    answer: list[Message] = list(row["chosen"]) if isinstance(row.get("chosen"), list) else []
    while messages and messages[-1]["role"] == "assistant":
        answer.append(messages.pop())
    if begun := next((message["prefill"] for message in answer if message.get("prefill")), 0):
        raise UserError(f"its prompt ends with {begun} letters of the answer, from where no answer can be written; drop them")
    if not messages:
        raise UserError("nothing stands before the answer, so there is no prompt")
    return messages


def labelled_answers(row: CanonicalRow, where: str) -> list[CanonicalRow]:
    """The answers of a canonical row as rows of their own, each with a `label`: both of a pair, else the one that it ends with.
    Raises UserError, which starts with `where`, for a row without a label."""
    if "chosen" in row:
        return [_alone(row, row[name]) | {"label": name == "chosen"} for name in ("chosen", "rejected")]
    if "label" not in row:
        others = row.get("columns", {})
        name = next((name for name in ("label", "kto_tag") if name in others), None)
        what = f"{name} is {others[name]!r}, not true or false" if name else "has no label, which is true of a good answer"
        raise UserError(f"{where}: {what}; write label: true or false, or give pairs")
    if "messages" not in row:
        return [row]
    if row["messages"][-1]["role"] != "assistant" or len(row["messages"]) < 2:
        raise UserError(f"{where}: does not end with the assistant's answer to something, so there is nothing that is labelled")
    return [{**row, "first": len(row["messages"]) - 1}]


def _alone(row: CanonicalRow, answer: str | list[Message]) -> CanonicalRow:
    """One answer of a pair, as a row that ends with it."""
    prompt, others = row["prompt"], {k: v for k, v in row.items() if k not in ("prompt", "chosen", "rejected")}
    if isinstance(prompt, str) and isinstance(answer, str):
        return {**others, "prompt": prompt, "completion": answer}
    before = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    after = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
    return {**others, "messages": [*before, *after], "first": len(before)}


def reference_of(row: CanonicalRow) -> str:
    """The words of the answer that the row has, of the chosen one in a pair; empty where it has none."""
    answer = row.get("completion", row.get("chosen", row.get("messages")))
    if isinstance(answer, list):
        last = answer[-1] if answer and answer[-1]["role"] == "assistant" else {}
        answer = (last.get("content") or "")[last.get("prefill", 0) :]
    return answer if isinstance(answer, str) else ""
