"""Where the workers of a run on Ray and the command that has asked for it leave word for one another."""

from __future__ import annotations


class Desk:
    """An actor of Ray."""

    def __init__(self) -> None:
        self._stopping = False
        self._codes: dict[int, int] = {}

    def stop(self) -> None:
        """All processes are to save and leave."""
        self._stopping = True

    def is_stopping(self) -> bool:
        """Are they?"""
        return self._stopping

    def tell(self, rank: int, code: int) -> None:
        """The process `rank` has ended with `code`; of several tries the last counts."""
        self._codes.pop(rank, None)
        self._codes[rank] = code

    def codes(self) -> dict[int, int]:
        """Exit codes by rank, in the order in which they have ended."""
        return self._codes
