"""A pack's documents by themselves: each with its prompt before it, laid out for models that cannot read the pack as it is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.batch import Segment

# A forward of several documents may hold so much padding for every token of theirs.
PADDING = 0.25


class Rows(NamedTuple):
    """Documents for one forward, a row each, padded on the right.

    places: int64 [n, L], where in the pack each token stands (padding: 0). real: int64 [n, L], 0 for padding. padded: is there
    any?
    """

    places: Tensor
    real: Tensor
    padded: bool


class Layout(NamedTuple):
    """All documents of a pack, and home: int64 [T], where in the rows, laid end to end, each token of the pack is read."""

    rows: list[Rows]
    home: Tensor


def documents(segments: Sequence[Segment]) -> list[list[int]]:
    """The places in the pack of each document's tokens, its prompt's first. A prompt that answers see is none by itself."""
    seen = {(s.prefix_start, s.prefix_stop) for s in segments if s.prefix_start < s.prefix_stop}
    alone = [s for s in segments if (s.start, s.stop) not in seen]
    return [[*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)] for s in alone]


def in_rows(segments: Sequence[Segment], device: torch.device, alone_beyond: int | None = None, at_once: bool = False) -> Layout:
    """One document a row, in as few forwards as padding allows: those of like length together.

    alone_beyond: a longer document has a forward to itself. at_once: all in one forward, whatever the padding.
    """
    found = documents(segments)
    groups: list[list[int]] = []
    for number in sorted(range(len(found)), key=lambda i: -len(found[i])):
        long = alone_beyond is not None and len(found[groups[-1][0] if groups else number]) > alone_beyond
        if groups and not long and (at_once or _fits([found[i] for i in [*groups[-1], number]])):
            groups[-1].append(number)
        else:
            groups.append([number])
    rows = [_rows([found[i] for i in sorted(group)], device) for group in groups]
    return Layout(rows, _home([[found[i] for i in sorted(group)] for group in groups], segments[-1].stop, device))


def end_to_end(segments: Sequence[Segment], device: torch.device) -> tuple[Layout, tuple[Segment, ...]]:
    """All documents in one row, none sharing its prompt with another, and the segments that they are there."""
    found = documents(segments)
    whole = [[place for document in found for place in document]]
    laid, stop = [], 0
    for document in found:
        laid.append(Segment(stop, stop + len(document)))
        stop += len(document)
    return Layout([_rows(whole, device)], _home([whole], segments[-1].stop, device)), tuple(laid)


def _fits(group: list[list[int]]) -> bool:
    lengths = [len(document) for document in group]
    return max(lengths) * len(lengths) <= (1 + PADDING) * sum(lengths)


def _rows(group: list[list[int]], device: torch.device) -> Rows:
    length = max(map(len, group))
    places = torch.tensor([[*d, *[0] * (length - len(d))] for d in group], device=device)
    real = torch.tensor([[1] * len(d) + [0] * (length - len(d)) for d in group], device=device)
    return Rows(places, real, any(len(d) < length for d in group))


def _home(groups: list[list[list[int]]], size: int, device: torch.device) -> Tensor:
    home, start = [-1] * size, 0
    for group in groups:
        length = max(map(len, group))
        for document in group:
            for offset, place in enumerate(document):
                if home[place] < 0:  # a shared prompt is read before each of its answers, and taken from the first
                    home[place] = start + offset
            start += length
    return torch.tensor(home, device=device)
