"""What a model is given at a time: tokens as sequences laid end to end, without padding; pictures as latents of one shape."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Batch(Protocol):
    """A micro-batch, as the loop sees it.

    loss_denominator: what its sum of losses is divided by, over a whole optimizer step; zero where it counts for nothing.
    size: how much it is, in the unit of its stage. rows: its examples' numbers in the run's data, for which the stage has names.
    """

    @property
    def loss_denominator(self) -> float:
        """What its sum of losses is divided by, over a whole optimizer step; zero where it counts for nothing."""
        ...

    @property
    def size(self) -> int:
        """How much it is, in the unit of its stage."""
        ...

    @property
    def rows(self) -> tuple[int, ...]:
        """Its examples' numbers in the run's data."""
        ...

    def to(self, device: torch.device | str) -> Self:
        """The same on another device."""
        ...

    def split(self) -> tuple[Self, ...]:
        """Two batches of half the examples, whose loss denominators add up to this one's; itself alone where there is one."""
        ...


# what a value of PackedBatch.extra is of; all others are of a prediction
PER = {"margin": "example", "pair_weight": "example", "step": "example", "reference": "answer"}


class Segment(NamedTuple):
    """Tokens `start:stop` of a pack attend causally to themselves and to all of `prefix_start:prefix_stop`.

    A document is a segment with an empty prefix; an answer's prefix is the prompt it shares with its rival, or the beginning of a
    document that goes on otherwise.
    """

    start: int
    stop: int
    prefix_start: int = 0
    prefix_stop: int = 0

    def moved(self, by: int) -> Segment:
        """The same segment `by` tokens further on; an empty prefix stays empty."""
        shares = self.prefix_start < self.prefix_stop
        prefix = (self.prefix_start + by, self.prefix_stop + by) if shares else (0, 0)
        return Segment(self.start + by, self.stop + by, *prefix)


@dataclass(frozen=True)
class PackedBatch:
    """T tokens in a row, and the N next-token predictions among them whose weight is not zero.

    tokens, positions: int64 [1, T]. logit_index: int64 [N], the index in T whose hidden state predicts `target`
    (int64 [N]). weight: float32 [N], never zero. sequence_id: int64 [N], the answer (0..num_answers-1) that each
    prediction belongs to; in a pair, 2k is the chosen and 2k+1 the rejected answer. eos_index: int64 [num_answers], the
    index in T of each answer's last token that counts: its end of turn. rows: number of each example's sequence in the run's
    data.
    loss_denominator: what the sum of this batch's losses is divided by, over a whole optimizer step (weights of tokens, or
    of pairs).
    """

    tokens: Tensor
    positions: Tensor
    segments: tuple[Segment, ...]
    logit_index: Tensor
    target: Tensor
    weight: Tensor
    sequence_id: Tensor
    eos_index: Tensor
    num_answers: int
    rows: tuple[int, ...]
    loss_denominator: float
    extra: dict[str, Tensor] = field(default_factory=dict[str, Tensor])

    @property
    def size(self) -> int:
        """T"""
        return self.tokens.shape[1]

    def split(self) -> tuple[PackedBatch, ...]:
        """Cut between two examples: an example is a document, or a prompt with its answers."""
        heads = [segment for segment in self.segments if segment.prefix_start == segment.prefix_stop]
        if len(heads) < 2:
            return (self,)
        half, cut = len(heads) // 2, heads[len(heads) // 2].start
        return self._part(0, half, 0, cut), self._part(half, len(heads), cut, self.size)

    def _part(self, first: int, last: int, start: int, stop: int) -> PackedBatch:
        """Examples first:last, which are tokens start:stop."""
        predicted = (self.logit_index >= start) & (self.logit_index < stop)
        answered = (self.eos_index >= start) & (self.eos_index < stop)
        of = {"example": slice(first, last), "answer": answered, "prediction": predicted}
        inside = [segment for segment in self.segments if start <= segment.start < stop]
        return PackedBatch(
            tokens=self.tokens[:, start:stop],
            positions=self.positions[:, start:stop],
            segments=tuple(Segment(*(max(0, place - start) for place in segment)) for segment in inside),
            logit_index=self.logit_index[predicted] - start,
            target=self.target[predicted],
            weight=self.weight[predicted],
            sequence_id=self.sequence_id[predicted] - int((self.eos_index < start).sum()),
            eos_index=self.eos_index[answered] - start,
            num_answers=int(answered.sum()),
            rows=self.rows[first:last],
            loss_denominator=self.loss_denominator * (last - first) / len(self.rows),
            extra={name: value[of[PER.get(name, "prediction")]] for name, value in self.extra.items()},
        )

    def to(self, device: torch.device | str) -> PackedBatch:
        """The same with its tensors on `device`."""
        names = ("tokens", "positions", "logit_index", "target", "weight", "sequence_id", "eos_index")
        moved = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        extra = {name: value.to(device, non_blocking=True) for name, value in self.extra.items()}
        return replace(self, **moved, extra=extra)


@dataclass(frozen=True)
class ImagePart:
    """n pictures of one shape, those of the individual first, with all that is random about their step.

    Their latents' posterior, mean and std [n, c, h, w], or, where nothing is cached, pixels [n, 3, H, W] in -1..1. draw,
    noise: float32 [n, c, h, w]; offset: [n, c, 1, 1]. level: int64 [n], how much noise. caption: int64 [n], into the module's
    table. sizes: float32 [n, 6], original height and width, crop's top and left, height and width. mask: [n, 1, h, w], what
    counts, or None for all.
    """

    mean: Tensor | None
    std: Tensor | None
    pixels: Tensor | None
    draw: Tensor
    noise: Tensor
    offset: Tensor
    level: Tensor
    caption: Tensor
    sizes: Tensor
    mask: Tensor | None
    num_instance: int


@dataclass(frozen=True)
class ImageBatch:
    """Pictures, in parts of one shape each. loss_denominator: how many are of the individual; size: how many there are."""

    parts: tuple[ImagePart, ...]
    rows: tuple[int, ...]
    loss_denominator: float

    @property
    def size(self) -> int:
        """Pictures of all parts."""
        return sum(len(part.level) for part in self.parts)

    def split(self) -> tuple[ImageBatch, ...]:
        """Picture by picture: the total is a sum over all of them."""
        if self.size < 2:
            return (self,)
        ends = [0, *accumulate(len(part.level) for part in self.parts)]
        found: list[ImageBatch] = []
        for start, stop in ((0, self.size // 2), (self.size // 2, self.size)):
            spans = [(max(0, start - end), min(len(part.level), stop - end)) for part, end in zip(self.parts, ends, strict=False)]
            parts = tuple(_cut(part, *span) for part, span in zip(self.parts, spans, strict=True) if span[0] < span[1])
            found.append(replace(self, parts=parts, loss_denominator=self.loss_denominator * (stop - start) / self.size))
        return tuple(found)

    def to(self, device: torch.device | str) -> ImageBatch:
        """The same with its tensors on `device`."""
        return replace(self, parts=tuple(_moved(part, device) for part in self.parts))


def _cut(part: ImagePart, start: int, stop: int) -> ImagePart:
    tensors = {name: value[start:stop] for name, value in vars(part).items() if isinstance(value, Tensor)}
    return replace(part, **tensors, num_instance=min(max(0, part.num_instance - start), stop - start))


def _moved(part: ImagePart, device: torch.device | str) -> ImagePart:
    tensors = {name: value for name, value in vars(part).items() if isinstance(value, Tensor)}
    return replace(part, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


Metrics = dict[str, tuple[Tensor, float | Tensor]]  # name -> (sum, count)


@dataclass
class LossOutput:
    """A sum, not a mean: the loop divides once by the `loss_denominator` of the whole optimizer step.

    total: scalar tensor with gradient. metrics: name -> (sum, count), detached, on any device; each is averaged as sum / count
    over everything that was seen since the last logged step. rows: name -> a value for each unit, detached; kept in evaluation.
    """

    total: Tensor
    metrics: Metrics = field(default_factory=Metrics)
    rows: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
