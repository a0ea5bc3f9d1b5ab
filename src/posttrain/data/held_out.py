"""Which rows of a source are held out: by a hash of their content, and no more of them than are measured."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from heapq import heappush, heappushpop

from posttrain.data.rows import Row
from posttrain.data.sources.source import NumberedRow, place


class HeldOut:
    """Sifts a source's rows. Of those whose `place` is below `share`, the `most` with the lowest places are held out.

    A row that was trained on is never held out later, when the data has grown or is shuffled (unless data.max_rows hid others).
    What repeats a held-out row is neither measured twice nor trained on.

    Args:
        drop: the first `most` are held out instead, repeats and all, and the others left out: so version 0.1 did.
    """

    def __init__(self, share: float, most: int, drop: bool = False) -> None:
        self._share, self._most, self._drop = share if most or drop else 0.0, most, drop
        self._found: dict[float, tuple[Row, list[int]]] = {}  # a row and its numbers, by place
        self._places: list[float] = []  # a heap of them, negative: the highest first
        self._first: list[NumberedRow] = []
        self.dropped = 0  # rows left out up to here, with `drop`

    def sift(self, rows: Iterable[NumberedRow]) -> Iterator[NumberedRow]:
        """The rows to train on; one that gives way to a lower place comes when that is read."""
        for number, row in rows:
            at = place(row) if self._share and isinstance(row, dict) else 1.0
            if at >= self._share or not isinstance(row, dict):
                yield number, row
            elif self._drop:
                self._take_first((number, row))
            elif at in self._found:
                self._found[at][1].append(number)
            else:
                self._found[at] = (row, [number])
                if len(self._places) < self._most:
                    heappush(self._places, -at)
                else:
                    given, numbers = self._found.pop(-heappushpop(self._places, -at))
                    yield from ((each, given) for each in numbers)

    def _take_first(self, row: NumberedRow) -> None:
        if len(self._first) < self._most:
            self._first.append(row)
        else:
            self.dropped += 1

    @property
    def full(self) -> bool:
        """Are as many held out as are measured?"""
        return len(self._found) + len(self._first) >= self._most or not self._share

    @property
    def rows(self) -> list[NumberedRow]:
        """Those held out up to here, in the order of the source."""
        distinct = [(numbers[0], row) for row, numbers in self._found.values()]
        return self._first or sorted(distinct, key=lambda item: item[0])

    @property
    def repeats(self) -> int:
        """Rows left out up to here because they repeat a held-out one."""
        return sum(len(numbers) - 1 for _, numbers in self._found.values())
