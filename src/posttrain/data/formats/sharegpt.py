"""Conversations as ShareGPT has them: a list of {from, value}, with its own names of the roles."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange
from posttrain.data.formats._conversations import conversation, first_message
from posttrain.data.rows import Row


def _recognises(row: Row) -> bool:
    first = first_message(row)
    return isinstance(first, dict) and "from" in first and "role" not in first


FORMAT = Format(
    columns="conversations, a list of {from, value}",
    kind="messages",
    precedence=50,
    recognises=_recognises,
    to_canonical=conversation,
    example={"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]},
    example_becomes={"messages": exchange("What is 2 + 2?", "4")},
)
