"""Who attends to whom in a pack: one relation of segments, as the masks that each way of computing attention asks for.

`dense_mask` is the relation written out, and the plain reference of all others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.batch import Segment
from posttrain.models.kernels.documents import Layout, end_to_end, in_rows

BAND = 128  # rows whose scores are written out at a time, and tokens of short documents that are taken side by side


def context_mask(prefix: int, length: int, window: int | None, device: torch.device | None = None) -> Tensor:
    """bool [length, prefix + length]: which of its prefix and itself each token of a segment attends to.

    A token sees itself and all before it, at most `window` tokens in all.
    """
    mask = torch.ones(length, prefix + length, dtype=torch.bool, device=device).tril(prefix)
    return mask if window is None else mask.triu(prefix - window + 1)


def dense_mask(segments: Sequence[Segment], num_tokens: int, window: int | None = None, memory: int = 0) -> Tensor:
    """bool [num_tokens, memory + num_tokens], True where the row's token attends to the column's.

    The first `memory` columns are what stands before every document.
    """
    mask = torch.zeros(num_tokens, memory + num_tokens, dtype=torch.bool)
    for start, stop, prefix_start, prefix_stop in segments:
        before = memory + prefix_stop - prefix_start
        context = context_mask(before, stop - start, window)
        mask[start:stop, :memory] = context[:, :memory]
        mask[start:stop, memory + prefix_start : memory + prefix_stop] = context[:, memory:before]
        mask[start:stop, memory + start : memory + stop] = context[:, before:]
    return mask


class Asked(NamedTuple):
    """What a layer asks of its attention. size, value_size: of a head."""

    heads: int
    key_heads: int
    size: int
    value_size: int
    window: int | None
    softcap: float | None
    sinks: bool


class Run(NamedTuple):
    """Neighbouring segments that see nothing outside, counted from the first one's start."""

    length: int
    segments: tuple[Segment, ...]


def runs(segments: Sequence[Segment]) -> list[Run]:
    """The pack cut into documents, each with all answers that share it as their prompt, or several up to BAND tokens."""
    families: list[list[Segment]] = []
    seen_from = segments[-1].stop  # the first token that a later segment sees
    for segment in reversed(segments):
        if segment.stop <= seen_from:
            families.append([])
        families[-1].insert(0, segment)
        if segment.prefix_start < segment.prefix_stop:
            seen_from = min(seen_from, segment.prefix_start)
    found: list[list[Segment]] = []
    for family in reversed(families):
        if found and family[-1].stop - found[-1][0].start <= BAND:
            found[-1] += family
        else:
            found.append(family)
    return [Run(run[-1].stop - run[0].start, tuple(s.moved(-run[0].start) for s in run)) for run in found]


class Band(NamedTuple):
    """Neighbouring rows of a run, and of its columns (memory before them) those that any of these rows attends to.

    bias: float32 [rows, columns], 0 where the row's token attends to the column's, else minus infinity.
    """

    rows: slice
    columns: tuple[slice, ...]
    bias: Tensor


def bands(mask: Tensor) -> list[Band]:
    """A run's relation (bool [length, memory + length]) cut into BAND rows each, without the columns that none of them sees."""
    found = []
    for start in range(0, len(mask), BAND):
        part = mask[start : start + BAND]
        seen = part.any(0)
        edge = torch.nn.functional.pad(seen.int(), (1, 1)).diff()
        edges = zip((edge == 1).nonzero()[:, 0].tolist(), (edge == -1).nonzero()[:, 0].tolist(), strict=True)
        part = part[:, seen]
        bias = torch.zeros(part.shape).masked_fill_(~part, -torch.inf)
        found.append(Band(slice(start, start + len(part)), tuple(slice(*both) for both in edges), bias))
    return found


class DocumentMask:
    """One pack's relation, and the masks made from it: once per pack, not once per layer.

    memory: for every layer keys and values [1, key heads, M, dim] that stand before each document (prefix tuning).
    """

    def __init__(
        self, segments: Sequence[Segment], num_tokens: int, device: torch.device, memory: Sequence[tuple[Tensor, Tensor]] = ()
    ) -> None:
        if [0, *(s.stop for s in segments)] != [*(s.start for s in segments), num_tokens]:
            raise ValueError("segments must cover the pack's tokens in order")
        self.segments, self.num_tokens, self.device = tuple(segments), num_tokens, device
        self.memory = tuple(memory)
        self.size = memory[0][0].shape[2] if memory else 0
        self.asked: list[Asked] = []  # by each attention layer that was run
        self._made: dict[tuple[Any, ...], Any] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], Any]) -> Any:
        """What `make` gives the first time that `key` is asked for."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def dense(self, window: int | None) -> Tensor:
        """The mask of the whole pack (see `dense_mask`); made once."""

        def make() -> Tensor:
            return dense_mask(self.segments, self.num_tokens, window, self.size).to(self.device)

        return self.once(("dense", window), make)

    @property
    def whole(self) -> Run:
        """The pack as a single run."""
        return Run(self.num_tokens, self.segments)

    @property
    def runs(self) -> list[Run]:
        """The pack cut into runs (see `runs`); made once."""
        return self.once(("runs",), lambda: runs(self.segments))

    def bands(self, run: Run, window: int | None) -> list[Band]:
        """A run cut into bands (see `bands`); made once."""
        return self.once(("bands", run, window), lambda: bands(dense_mask(run.segments, run.length, window, self.size)))

    def context(self, prefix: int, length: int, window: int | None) -> Tensor:
        """The mask of a segment after its prefix (see `context_mask`); made once."""
        return self.once(("context", prefix, length, window), lambda: context_mask(prefix, length, window, self.device))

    def rows(self, alone_beyond: int | None, at_once: bool) -> Layout:
        """The pack's documents, one a row (see `in_rows`); made once."""
        return self.once(("rows", alone_beyond, at_once), lambda: in_rows(self.segments, self.device, alone_beyond, at_once))

    @property
    def end_to_end(self) -> tuple[Layout, tuple[Segment, ...]]:
        """The pack's documents in one row, none of which shares its prompt; made once."""
        return self.once(("joined",), lambda: end_to_end(self.segments, self.device))

    @property
    def borders(self) -> dict[str, Any]:
        """Where documents begin, as transformers' recurrent layers and kernels ask for it."""
        lengths = torch.tensor([s.stop - s.start for s in self.segments], device=self.device)
        ends = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        numbers = torch.arange(len(lengths), device=self.device, dtype=torch.int32).repeat_interleave(lengths)
        longest = max(s.stop - s.start for s in self.segments)
        by_ends = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
        return by_ends | {"seq_idx": numbers[None]}
