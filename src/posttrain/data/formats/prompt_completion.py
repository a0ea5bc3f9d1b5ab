"""A prompt and what is to follow it, as texts or as messages, under the names that people give the two."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, history_of, system_of, text_of
from posttrain.data.formats._conversations import continued, tools_of
from posttrain.data.formats._messages import messages, unpacked
from posttrain.data.rows import CanonicalRow, Row

_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"))


def _columns_in(row: Row) -> tuple[str, str] | None:
    return next(((a, b) for a, b in _COLUMNS if a in row and b in row), None)


def _to_canonical(row: Row) -> CanonicalRow:
    """prompt and completion that are both text go on as plain text, one after the other without a template; question and
    answer, prompt and response, query and response, or lists of messages become a conversation, of which the answer alone is
    trained."""
    names = _columns_in(row) or _COLUMNS[0]
    prompt, completion = (unpacked(row.get(name)) for name in names)
    before, tools = [*system_of(row), *history_of(row)], tools_of(row)
    listed = isinstance(prompt, list | dict) or isinstance(completion, list | dict)
    if names == _COLUMNS[0] and not (listed or before or tools):
        return {"prompt": text_of(row, "prompt"), "completion": text_of(row, "completion")}
    asked = messages(prompt, names[0]) if isinstance(prompt, list | dict) else exchange(text_of(row, names[0]), "")[:1]
    told = messages(completion, names[1]) if isinstance(completion, list | dict) else exchange("", text_of(row, names[1]))[1:]
    whole, first = continued([*before, *asked], told, names[1])
    given = [m | {"weight": 0} if m["role"] == "assistant" and listed else m for m in whole[:first]]
    return {"messages": [*given, *whole[first:]], **tools}


FORMAT = Format(
    columns="prompt and completion, prompt and response, question and answer, or query and response",
    kind="prompt_completion",
    precedence=20,
    recognises=lambda row: _columns_in(row) is not None,
    to_canonical=_to_canonical,
    example={"prompt": "2 + 2 =", "completion": " 4"},
    example_becomes={"prompt": "2 + 2 =", "completion": " 4"},
)
