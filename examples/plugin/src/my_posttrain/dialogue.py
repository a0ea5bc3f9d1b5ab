"""A data format: rows with the columns `asked` and `said`."""

from typing import Any

from posttrain.data.formats import Format
from posttrain.errors import UserError


def to_canonical(row: dict[str, Any]) -> dict[str, Any]:
    """As a conversation. What it refuses is named with the file and the row's number."""
    if not row["said"]:
        raise UserError("said is empty")
    return {"messages": [{"role": "user", "content": row["asked"]}, {"role": "assistant", "content": row["said"]}]}


FORMAT = Format(
    columns="asked and said",
    kind="messages",
    precedence=25,
    recognises=lambda row: "asked" in row and "said" in row,
    to_canonical=to_canonical,
    example={"asked": "q", "said": "a"},
    example_becomes={"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
)
