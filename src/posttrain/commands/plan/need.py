"""What a run needs of one device as its micro-batches grow: memory and time are functions of their tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from posttrain.devices.device import Rates
from posttrain.models.language.activations import Activations
from posttrain.models.language.room import Layers
from posttrain.stages.language.recompute import USED

FORMS = 0.516 + 2  # bytes that are read of a number in NF4, and written of it in 16 bit


@dataclass(frozen=True)
class Need:
    """lying: bytes that are there before training; later: those that it adds, whatever the batch: gradients, moments. kept,
    inputs: what a layer leaves for the backward, and its inputs, a token; narrow: what it leaves where what can goes in tiles.
    head: bytes, of so many tokens. asked: as `train.gradient_checkpointing`."""

    lying: float
    later: float
    kept: float
    inputs: float
    narrow: float
    layers: int
    head: Callable[[int], float]
    asked: bool | int | Literal["auto"]
    capacity: float

    def of_layers(self, tokens: int) -> Layers:
        """What a micro-batch of so many tokens leaves."""
        return Layers.of(self.kept * tokens, self.narrow * tokens, self.inputs * tokens, self.layers, tokens)

    def recomputed(self, tokens: int) -> int:
        """Of so many layers, as a run's own `fit_memory` chooses."""
        if self.asked == "auto":
            free = USED * (self.capacity - self.lying) - self.later - self.head(tokens)
            return self.of_layers(tokens).to_recompute(free)
        return min(self.layers, {True: self.layers, False: 0}[self.asked] if isinstance(self.asked, bool) else self.asked)

    def total(self, tokens: int, recomputed: int | None = None) -> float:
        """All bytes with a micro-batch of so many tokens."""
        layers = self.recomputed(tokens) if recomputed is None else recomputed
        return self.lying + self.later + self.head(tokens) + self.of_layers(tokens).most(layers)

    def fits(self, tokens: int) -> bool:
        """Does such a micro-batch?"""
        return self.total(tokens) <= self.capacity

    def most(self, step: int = 1) -> int:
        """The largest number of tokens that fits, a multiple of `step`; 0 where none does."""
        return largest(self.fits, step)


def largest(fits: Callable[[int], bool], step: int = 1, most: float = math.inf) -> int:
    """The largest multiple of `step`, at most `most`, for which `fits`; 0 where there is none. What is smaller than one that fits
    does too."""
    if step > most or not fits(step):
        return 0
    low, high = 1, 2
    while high * step <= most and fits(high * step):
        low, high = high, 2 * high
    if high * step > most:
        high = int(most // step) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def micro_batch_seconds(found: Activations, recomputed: float, quantized: float, body: Rates, head: Rates) -> float:
    """Of forward and backward. recomputed: the share of the layers that are. quantized: numbers whose 16-bit form is made in
    every pass over a layer."""
    made = quantized * FORMS * (2 + recomputed) / body.bytes
    return (1 + recomputed) * body.seconds(found.forward) + body.seconds(found.backward) + head.seconds(found.head) + made
