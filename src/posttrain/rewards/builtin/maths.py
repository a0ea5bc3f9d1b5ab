"""Is an answer's formula equal to the right one?"""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

from posttrain.errors import UserError
from posttrain.rewards.builtin._truth import Compares, truths


class Maths(Compares):
    """1 where math-verify, which reads LaTeX and asks sympy, finds both equal, 0 where not, None where it cannot read the right
    one.

    Args:
        column: of the rows, as for `exact`.
    """

    def __init__(self, column: str | None = None) -> None:
        if find_spec("math_verify") is None:
            raise UserError(
                "reward.function: maths needs math-verify; pip install 'posttrain[rewards]', or say reward.function=numeric"
            )
        self.column = column

    def __call__(self, answers: list[str], references: list[str], **columns: list[object]) -> list[float | None]:
        from math_verify import parse, verify  # pyright: ignore

        def score(said: str, right: str | None) -> float | None:
            wanted: Any = [] if right is None else _parsed(parse, right)
            # without its own limits, which set the alarm that this call's limit uses
            return float(verify(wanted, parse(said, parsing_timeout=None), timeout_seconds=None)) if wanted else None

        known = truths(self.column, references, columns, "maths")
        return [score(said, right) for said, right in zip(answers, known, strict=True)]


def _parsed(parse: Any, right: str) -> Any:
    """The right answer, as it is written or as a formula without its signs."""
    return parse(right, parsing_timeout=None) or parse(f"${right}$", parsing_timeout=None)


REWARD = Maths
