"""Records as JSON has them, read back."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from architectures.trial import Cell, Record


def write_records(file: Path, records: list[Record]) -> None:
    """All of them; a file that is there is whole at any moment."""
    beside = file.with_suffix(".new")
    beside.write_text(json.dumps([asdict(record) for record in records], indent=1))
    beside.replace(file)


def read_records(file: Path) -> list[Record]:
    """What `write_records` has written; nothing where there is no file."""
    if not file.is_file():
        return []
    found = json.loads(file.read_text())
    return [Record(**{**each, "cells": {name: Cell(**cell) for name, cell in each["cells"].items()}}) for each in found]
