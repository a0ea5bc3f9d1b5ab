"""How many of its words does an answer share with the right one?"""

from __future__ import annotations

from posttrain.rewards.builtin._truth import Compares, final_answer, truths
from posttrain.rewards.builtin._words import word_f1


class F1(Compares):
    """F1 of the words of both final answers, in any order: 0 to 1 (as SQuAD, arXiv 1606.05250, but articles count).

    Args:
        column: as that of exact.
    """

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    def __call__(self, answers: list[str], references: list[str], **columns: list[object]) -> list[float | None]:
        known = truths(self.column, references, columns, "f1")
        return [
            None if right is None else word_f1(final_answer(said), final_answer(right))
            for said, right in zip(answers, known, strict=True)
        ]


REWARD = F1
