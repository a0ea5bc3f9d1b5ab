"""Columns of text, which several formats have."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

from posttrain.data.rows import Message, Row
from posttrain.errors import UserError, did_you_mean


def text_of(row: Row, *names: str) -> str:
    """The first of the columns that the row has. Raises UserError where there is none, or it is no text."""
    name = next((n for n in names if n in row), None)
    if name is None:
        raise UserError(f"has no {' or '.join(names)}{did_you_mean(names[0], list(row))}; its columns are {columns_of(row)}")
    return checked_text(row[name], name)


def checked_text(value: object, name: str) -> str:
    """The value, which must be text. Raises UserError, which starts with `name`."""
    if isinstance(value, str):
        return value
    if value is None or value != value:
        raise UserError(f"{name} is {'null' if value is None else 'NaN'}; text is needed, so fill it or drop the row")
    raise UserError(f"{name} is {type(value).__name__} where text is needed")


def columns_of(row: Row) -> str:
    """The names of a row's columns, for an error."""
    return ", ".join(map(str, row)) or "none"


def instruction_of(row: Row) -> str:
    """What Alpaca asks: the instruction, then a line feed and the input if there is any."""
    instruction = text_of(row, "instruction")
    extra = checked_text(row["input"], "input") if row.get("input") is not None else ""
    return f"{instruction}\n{extra}" if extra.strip() else instruction


def system_of(row: Row) -> list[Message]:
    """The system message of a row with a column of that name; nothing where it is empty."""
    return [{"role": "system", "content": row["system"]}] if isinstance(row.get("system"), str) and row["system"] else []


def history_of(row: Row) -> list[Message]:
    """The turns before, of a row with a column of that name; nothing where it is empty."""
    history: Any = row.get("history") or []
    if not isinstance(history, list) or not all(map(_is_exchange, cast("list[Any]", history))):
        raise UserError("history is not a list of [question, answer]")
    turns = cast("list[tuple[Any, Any]]", history)
    return [m for a, b in turns for m in exchange(checked_text(a, "history"), checked_text(b, "history"))]


def _is_exchange(turn: Any) -> bool:
    return isinstance(turn, list | tuple) and len(cast("Sequence[Any]", turn)) == 2


def exchange(user: str, assistant: str) -> list[Message]:
    """A question and its answer."""
    return [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
