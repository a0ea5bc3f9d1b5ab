"""A reward of ppo, and a metric of `eval.generate`: is an answer polite?"""


class Polite:
    """1 where a word of thanks or asking is in the answer, 0 where not.

    Args:
        words: that make it polite; `+reward.options.polite.words=[please]`.
    """

    def __init__(self, words: tuple[str, ...] = ("please", "thank")) -> None:
        self.words = tuple(words)

    def __call__(self, answers: list[str]) -> list[float]:
        """A number for each answer; None where it does not apply."""
        return [float(any(word in answer.lower() for word in self.words)) for answer in answers]


REWARD = Polite
