"""Conversations as chat APIs have them: a list of {role, content}, perhaps with tools."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange
from posttrain.data.formats._conversations import conversation, conversation_column

FORMAT = Format(
    columns="messages or conversations, a list of {role, content}",
    kind="messages",
    precedence=40,
    recognises=lambda row: conversation_column(row) is not None,
    to_canonical=conversation,
    example={"messages": exchange("What is 2 + 2?", "4"), "id": 7},
    example_becomes={"messages": exchange("What is 2 + 2?", "4"), "columns": {"id": 7}},
)
