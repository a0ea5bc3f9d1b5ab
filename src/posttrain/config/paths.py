"""Where the shipped YAML files and pages lie: inside an installed package, or at the top of a checkout."""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[1]


def root(kind: str) -> Path:
    """The directory of "configs", "recipes" or "docs"."""
    return next(p for p in (_PACKAGE / kind, _PACKAGE.parents[1] / kind) if p.is_dir())
