"""The data formats that people have, a file each, and the canonical rows that they all become.

A new format is a new file here, or an installed package with an entry point of the group `posttrain.data_formats`: a module
with `FORMAT = Format(...)`. Its name, as `data.shape=` takes it, is the file's or the entry point's.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from posttrain.config.schema.data import DATA_FORMATS
from posttrain.config.stages import REGISTRY
from posttrain.data.formats._checks import label_of, refuse_media, refuse_surrogates
from posttrain.data.row_use import RowUse
from posttrain.data.rows import CanonicalRow, Row
from posttrain.errors import UserError, did_you_mean
from posttrain.registry import Registry


@dataclass(frozen=True)
class Format:
    """One layout of a row's columns.

    Args:
        columns: what they look like, in a line, for messages and docs.
        kind: of the canonical rows that it becomes, which says what can be done with them: text (a document), messages (a
            conversation), prompt_completion (a text and how it goes on), pairs (two answers, one of them better) or prompts
            (without an answer).
        precedence: where several formats recognise a row the highest wins, so the more specific one has the higher.
        recognises: whether a row's columns are of this format. It sees the first row alone, and must not raise.
        to_canonical: a row as canonical; raises UserError for what is wrong with it, without saying where it is. What it does
            not look into by row[name] or row.get(name) is kept, under `columns`.
        example: a row of this format.
        example_becomes: what to_canonical makes of it.
    """

    columns: str
    kind: str
    precedence: int
    recognises: Callable[[Row], bool]
    to_canonical: Callable[[Row], CanonicalRow]
    example: Row
    example_becomes: CanonicalRow


KEPT = ("weight", "chat_template_kwargs")  # columns that mean the same in every format

FORMATS: Registry[Format] = DATA_FORMATS


def guest_files() -> list[Path]:
    """The files of formats that other packages add: their code decides what is tokenised, as ours does."""
    FORMATS.all()
    files = {sys.modules[entry.module].__file__ for entry in entry_points(group=FORMATS.group)}
    return sorted(Path(file) for file in files if file)


def by_precedence() -> dict[str, Format]:
    """Every format by its name, the most specific first."""
    return dict(sorted(FORMATS.all().items(), key=lambda item: -item[1].precedence))


def recognise(row: Row) -> str:
    """Name of the format that a row's columns are of. Raises UserError where there is none, or two of the same precedence."""
    formats = by_precedence()
    fitting = [name for name, each in formats.items() if each.recognises(row)]
    columns = ", ".join(map(str, row)) or "(none)"
    if not fitting:
        known = "; ".join(f"{name} ({each.columns})" for name, each in formats.items())
        names = _names(formats)
        near = next(filter(None, (did_you_mean(name, names) for name in map(str, row) if name not in names)), "")
        raise UserError(f"data.shape: the columns {columns} make no known shape{near}; rename them to one of: {known}")
    rivals = [name for name in fitting if formats[name].precedence == formats[fitting[0]].precedence]
    if len(rivals) > 1:
        raise UserError(f"data.shape: the columns {columns} fit {' and '.join(rivals)}; give data.shape={rivals[0]} or another")
    return fitting[0]


def _names(formats: dict[str, Format]) -> list[str]:
    """The columns that formats speak of."""
    words = {word for each in formats.values() for word in re.findall(r"\w+", each.columns)}
    return sorted(words - {"a", "and", "an", "answer", "list", "mostly", "of", "or", "with", "without", "the"} | {"answer"})


def check_fits(shape: str, use: RowUse, path: str = "") -> None:
    """Raises UserError if rows of the format `shape` are of no kind that `use` takes. path: where they are, for that."""
    found = FORMATS.get(shape)
    if found.kind in use.takes:
        return
    fitting = [spec for spec in REGISTRY.all().values() if spec.rows and found.kind in spec.rows.takes]
    takers = [spec.name for spec in sorted(fitting, key=lambda spec: spec.position)]
    instead = f"use posttrain {' or '.join(takers)}, or " if takers else ""
    where = f", which {path} holds" if path else ""
    raise UserError(f"data.path: {use.name} does not take {shape} ({found.columns}){where}; {instead}give data with {use.needs}")


def to_canonical(row: Row, shape: str, where: str) -> CanonicalRow:
    """A row of the format `shape` as a canonical one, with its own columns KEPT and `label`, if it has them, and under
    `columns` what the format has not taken from it.

    Raises UserError, which starts with `where`, for a malformed row, and for one with pictures.
    """
    taken, kind = _Taken(row), FORMATS.get(shape).kind
    try:
        canonical = FORMATS.get(shape).to_canonical(taken)
        canonical = canonical | {name: row[name] for name in KEPT if taken.get(name) is not None}
        if kind in ("messages", "prompt_completion") and (label := label_of(row)):
            canonical = {**canonical, "label": all(label.values())}
            taken.names.update(label)
        refuse_media(row, canonical)
        refuse_surrogates(canonical)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    earlier: dict[str, Any] = row["columns"] if isinstance(row.get("columns"), dict) else {}  # of a canonical row
    others = earlier | {k: v for k, v in row.items() if k not in taken.names and v is not None and v is not earlier}
    return {**canonical, "columns": others} if others else canonical


class _Taken(dict[str, Any]):
    """A row that knows which of its columns were looked into."""

    def __init__(self, row: Row) -> None:
        super().__init__(row)
        self.names = set[str]()

    def __getitem__(self, name: str) -> Any:
        self.names.add(name)
        return super().__getitem__(name)

    def get(self, name: str, default: Any = None) -> Any:
        self.names.add(name)
        return super().get(name, default)
