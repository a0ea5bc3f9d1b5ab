"""Which texts end a message in what a chat template renders, and which of them ends an answer."""

from __future__ import annotations

import re

from posttrain.data.chat.alignment import any_of
from posttrain.data.chat.rendering import Renderer


class Ends:
    """What ends a turn: the tokens that close a last message, where no next header can stand, and `stops`.

    GLM closes no message: its models stop by writing the next turn's header token. Where `stops` confirm that, the token is an
    end, and it is appended to a conversation that ends with an answer.
    """

    def __init__(self, renderer: Renderer, stops: set[str]) -> None:
        self._renderer, self._stops = renderer, stops
        probes = [probe for roles in (("user",), ("user", "assistant")) if (probe := renderer.probe(*roles))]
        closings = {end for text, places in probes for end in self._closings(text, places[-1], stops)}
        self.texts = frozenset(closings | stops)
        self.any = re.compile(any_of(tuple(self.texts)))
        self.next = re.compile(rf"\s*({self.any.pattern})")
        self.closing = re.compile(rf"\s*({any_of(tuple(closings))})")  # what a stop may be that is the next one's header as well
        self.appended = ""
        last, middle = renderer.probe("user", "assistant"), renderer.probe("user", "assistant", "user")
        if last and middle and not renderer.next_special.match(last[0], last[1][-1]):
            header = renderer.next_special.match(middle[0], middle[1][1])
            self.appended = header.group(1) if header and header.group(1) in stops else ""

    @property
    def of_answer(self) -> str:
        """The special token with which an answer that ends a conversation is over; empty where the template closes none."""
        probe = self._renderer.probe("user", "assistant")
        run = max(self._closings(probe[0], probe[1][-1], self._stops), key=len, default="") if probe else ""
        return next((token for token in self._renderer.special if run.endswith(token)), "")

    def without(self, turn: str) -> str:
        """A turn without the end that it has."""
        return turn.removesuffix(max((end for end in self.texts if turn.endswith(end)), key=len, default=""))

    def _closings(self, text: str, position: int, stops: set[str]) -> set[str]:
        """The run of special tokens after `position` up to one of `stops` (Cohere 2 has two), and its beginnings."""
        closings, run = set(), ""
        match = self._renderer.next_special.match(text, position)
        while match and (not run or match.start(1) == position):
            run, position = run + match.group(1), match.end(1)
            closings.add(run)
            match = None if match.group(1) in stops else self._renderer.next_special.match(text, position)
        return closings
