"""What an answer is compared with: a column of the rows, or the data's own answer; and the final answer that a text comes to."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from posttrain.rewards.builtin._columns import no_column

USUAL = ("solution", "ground_truth", "answer", "final_answer", "label")  # columns that hold the right answer
_NUMBER = re.compile(r"[-+]?(?:\d[\d,]*)?\.?\d+(?:[eE][-+]?\d+)?(?:\s*/\s*\d+)?")
_FRACTION = re.compile(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}")


class Compares:
    """A reward that compares with the right answer. column: of the rows, that holds it, or None."""

    column: str | None

    def lacks(self, columns: Collection[str]) -> str:
        """Of rows with these columns and without answers: '' or that there is nothing to compare with."""
        if self.column is not None or any(name in columns for name in USUAL):
            return ""
        return f"has nothing to compare with: no row has an answer, or one of {', '.join(USUAL)}, or name its column in options"


def truths(column: str | None, references: Sequence[str], columns: Mapping[str, Sequence[Any]], name: str) -> list[str | None]:
    """The right answers, None where a row has none: what it has in `column`, else in the first of the USUAL ones in which it has
    something, else the data's answer."""
    if column is not None and column not in columns:
        raise no_column(name, column, columns)
    looked_in = [columns[name] for name in ([column] if column else USUAL) if name in columns]
    held = [references] if column is None else []
    return [
        next((str(each[i]) for each in (*looked_in, *held) if each[i] not in (None, "")), None) for i in range(len(references))
    ]


def final_answer(text: str) -> str:
    """What a text comes to: its last \\boxed{...}, else what stands after its last ####, else all; spaces at its ends off."""
    if (start := text.rfind("\\boxed{")) >= 0:
        return _braced(text[start + len("\\boxed{") :]).strip()
    return text.rpartition("####")[2].strip() if "####" in text else text.strip()


def number_in(text: str) -> float | None:
    """The last number of a text: 1,234 and $5 and 50% and 1/2 and \\frac{1}{2} are such; None where there is none."""
    text = _FRACTION.sub(r"\1/\2", text)
    found = _NUMBER.findall(text)
    if not found:
        return None
    above, _, below = found[-1].replace(",", "").partition("/")
    try:
        return float(above) / float(below) if below else float(above)
    except (ValueError, ZeroDivisionError):
        return None


def _braced(text: str) -> str:
    """Up to the brace that closes one opened before; all of it where none does."""
    depth = 1
    for i, letter in enumerate(text):
        depth += (letter == "{") - (letter == "}")
        if not depth:
            return text[:i]
    return text
