"""A prompt and what is to follow it, as texts or as messages, under the names that people give the two."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, system_of, text_of
from posttrain.data.formats._conversations import messages
from posttrain.data.rows import CanonicalRow, Row

_COLUMNS = (("prompt", "completion"), ("prompt", "response"), ("question", "answer"))


def _columns_in(row: Row) -> tuple[str, str] | None:
    return next(((a, b) for a, b in _COLUMNS if a in row and b in row), None)


def _to_canonical(row: Row) -> CanonicalRow:
    """prompt and completion that are both text go on as plain text, one after the other without a template; question and
    answer, prompt and response, or lists of messages become a conversation."""
    names = _columns_in(row) or _COLUMNS[0]
    prompt, completion = (row[n] if isinstance(row.get(n), list) else text_of(row, n) for n in names)
    if isinstance(prompt, str) and isinstance(completion, str) and names == _COLUMNS[0]:
        return {"prompt": prompt, "completion": completion}
    before = exchange(prompt, "")[:1] if isinstance(prompt, str) else messages(prompt, names[0])
    after = exchange("", completion)[1:] if isinstance(completion, str) else messages(completion, names[1])
    return {"messages": [*system_of(row), *before, *after]}


FORMAT = Format(
    columns="prompt and completion, prompt and response, or question and answer",
    kind="prompt_completion",
    precedence=20,
    recognises=lambda row: _columns_in(row) is not None,
    to_canonical=_to_canonical,
    example={"prompt": "2 + 2 =", "completion": " 4"},
    example_becomes={"prompt": "2 + 2 =", "completion": " 4"},
)
