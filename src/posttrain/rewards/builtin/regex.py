"""Has an answer the form that it should have?"""

from __future__ import annotations

import re

from posttrain.errors import UserError


class Regex:
    """1 where the pattern is found, 0 where not.

    Args:
        pattern: of Python's `re`; a dot is any letter, ends of lines too. The default is a thought
            and an answer after it.
        whole: whether the whole answer must be of it, not only a part.
    """

    def __init__(self, pattern: str = r"\s*<think>.+?</think>\s*\S.*", whole: bool = True) -> None:
        try:
            self.pattern = re.compile(pattern, re.DOTALL)
        except re.error as error:
            raise UserError(f"reward.options.regex.pattern: {pattern!r} is no regular expression ({error})") from None
        self.whole = whole

    def __call__(self, answers: list[str]) -> list[float]:
        found = self.pattern.fullmatch if self.whole else self.pattern.search
        return [float(found(answer) is not None) for answer in answers]


REWARD = Regex
