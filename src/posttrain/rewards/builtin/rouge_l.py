"""How much of the right answer does an answer say in the same order?"""

from __future__ import annotations

from posttrain.rewards.builtin._truth import Compares, truths
from posttrain.rewards.builtin._words import f1_of, longest_common, words


class RougeL(Compares):
    """ROUGE-L (Lin 2004): F1 of the longest sequence of words that both whole texts have in the same order: 0 to 1.

    Args:
        column: as that of exact.
    """

    def __init__(self, column: str | None = None) -> None:
        self.column = column

    def __call__(self, answers: list[str], references: list[str], **columns: list[object]) -> list[float | None]:
        known = truths(self.column, references, columns, "rouge_l")
        return [None if right is None else _score(words(said), words(right)) for said, right in zip(answers, known, strict=True)]


def _score(said: list[str], known: list[str]) -> float:
    return f1_of(longest_common(said, known), len(said), len(known))


REWARD = RougeL
