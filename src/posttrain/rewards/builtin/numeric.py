"""Does an answer come to the right number?"""

from __future__ import annotations

import math

from posttrain.rewards.builtin._truth import Compares, final_answer, number_in, truths


class Numeric(Compares):
    """1 where the last number of the final answer is the right one, 0 where not, None where the row has no number.

    GSM8K's rows are right as they are: what stands after #### is their final answer.

    Args:
        column: of the rows, as for `exact`.
        tolerance: by which share of it the number may be off.
        marked: whether an answer must mark its final answer with \\boxed{} or ####; without it its last number is taken.
    """

    def __init__(self, column: str | None = None, tolerance: float = 1e-6, marked: bool = False) -> None:
        self.column, self.tolerance, self.marked = column, tolerance, marked

    def __call__(self, answers: list[str], references: list[str], **columns: list[object]) -> list[float | None]:
        known = truths(self.column, references, columns, "numeric")
        return [self._score(said, right) for said, right in zip(answers, known, strict=True)]

    def _score(self, said: str, right: str | None) -> float | None:
        wanted = None if right is None else number_in(final_answer(right))
        if wanted is None:
            return None
        if self.marked and "\\boxed{" not in said and "####" not in said:
            return 0.0
        found = number_in(final_answer(said))
        return float(found is not None and math.isclose(found, wanted, rel_tol=self.tolerance, abs_tol=1e-12))


REWARD = Numeric
