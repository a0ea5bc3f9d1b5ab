"""Is an answer, or what it comes to, the right one word for word?"""

from __future__ import annotations

from posttrain.rewards.builtin._truth import Compares, final_answer, truths


class Exact(Compares):
    """1 where the final answers are the same, 0 where not, None where the row has no right answer.

    Args:
        column: of the rows, that holds it; None: solution, ground_truth, answer, final_answer, label, or the data's own answer.
        case: whether capitals count.
    """

    def __init__(self, column: str | None = None, case: bool = False) -> None:
        self.column, self.case = column, case

    def __call__(self, answers: list[str], references: list[str], **columns: list[object]) -> list[float | None]:
        """The final answer is the last \\boxed{...}, what stands after the last ####, or all; runs of spaces are one."""
        known = truths(self.column, references, columns, "exact")
        return [
            None if right is None else float(self._plain(said) == self._plain(right))
            for said, right in zip(answers, known, strict=True)
        ]

    def _plain(self, text: str) -> str:
        words = " ".join(final_answer(text).split())
        return words if self.case else words.casefold()


REWARD = Exact
