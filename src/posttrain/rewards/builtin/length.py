"""Is an answer as long as it should be?"""

from __future__ import annotations

from posttrain.errors import UserError


class Length:
    """1 from `at_least` to `at_most` words; below it falls to 0 at none, above to 0 at twice as many.

    Args:
        at_least, at_most: words, which spaces part.
    """

    def __init__(self, at_least: int = 0, at_most: int = 100) -> None:
        if not 0 <= at_least <= at_most or not at_most:
            raise UserError(
                f"reward.options.length: at_least={at_least} and at_most={at_most} leave no answer; give at_least <= at_most"
            )
        self.at_least, self.at_most = at_least, at_most

    def __call__(self, answers: list[str]) -> list[float]:
        return [self._score(len(answer.split())) for answer in answers]

    def _score(self, words: int) -> float:
        if words < self.at_least:
            return words / self.at_least
        return max(0.0, 1 - max(0, words - self.at_most) / self.at_most)


REWARD = Length
