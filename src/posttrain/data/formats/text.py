"""Documents: a column of text."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import text_of

FORMAT = Format(
    columns="text or content",
    kind="text",
    precedence=10,
    recognises=lambda row: "text" in row or "content" in row,
    to_canonical=lambda row: {"text": text_of(row, "text", "content")},
    example={"content": "Two and two make four.", "url": "https://example.org"},
    example_becomes={"text": "Two and two make four.", "columns": {"url": "https://example.org"}},
)
