"""What rows are used for: the one thing that data code knows of a stage."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RowUse:
    """Which rows a stage takes, and what becomes of them.

    Args:
        name: of the stage, as errors say it.
        takes: kinds of canonical rows (see `Format.kind`).
        examples: the kind of examples that they become (data/example_kinds.py): documents, conversations, pairs, scored_pairs,
            labelled or prompts.
        needs: in words, what to give in place of rows that do not fit.
    """

    name: str
    takes: tuple[str, ...]
    examples: str
    needs: str
