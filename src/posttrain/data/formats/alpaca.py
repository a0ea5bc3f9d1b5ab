"""Instructions as Alpaca has them, also with the columns `system` and `history` of LLaMA-Factory."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, history_of, instruction_of, system_of, text_of
from posttrain.data.formats._conversations import tools_of
from posttrain.data.rows import CanonicalRow, Row


def _to_canonical(row: Row) -> CanonicalRow:
    """The user's message is the instruction, then a line feed and the input if there is any; `history` comes before it."""
    user, output = instruction_of(row), text_of(row, "output")
    return {"messages": [*system_of(row), *history_of(row), *exchange(user, output)], **tools_of(row)}


FORMAT = Format(
    columns="instruction, input, output",
    kind="messages",
    precedence=30,
    recognises=lambda row: "instruction" in row and "output" in row,
    to_canonical=_to_canonical,
    example={"instruction": "Add the numbers.", "input": "2 and 2", "output": "4"},
    example_becomes={"messages": exchange("Add the numbers.\n2 and 2", "4")},
)
