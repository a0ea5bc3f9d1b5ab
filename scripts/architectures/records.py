"""Records as JSON has them, read back."""

from __future__ import annotations

import json
from pathlib import Path

from architectures.trial import Cell, Record


def read_records(file: Path) -> list[Record]:
    """What --json has written."""
    found = json.loads(file.read_text())
    return [Record(**{**each, "cells": {name: Cell(**cell) for name, cell in each["cells"].items()}}) for each in found]
