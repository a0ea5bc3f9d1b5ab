"""What layers have in memory at most for one micro-batch, and how many of them must be recomputed to fit: one rule for a run
and for its plan."""

from __future__ import annotations

import math
from typing import NamedTuple

from posttrain.models.kernels.tiles import TILE, largest_tile

# Of what a layer keeps: what is there at most while its backward runs, beside it. Llama 3 8B on an H100: in its MLP three
# gradients as wide as what is kept of it, and what LoRA's factors are multiplied by. With all activations sent away, and before
# MLPs went in tiles, 61,440 tokens fitted into 24 GB, where a plan for a 4090 said 51,146.
GRADIENTS = 1.4


class Layers(NamedTuple):
    """kept: bytes that a layer leaves for the backward; inputs: what of it recomputation still needs; number: of layers; inside:
    what one that is recomputed has in whole while its backward runs."""

    kept: float
    inputs: float
    number: int
    inside: float

    @classmethod
    def of(cls, kept: float, narrow: float, inputs: float, number: int, tokens: int) -> Layers:
        """For so many tokens. narrow: as kept, without what goes in tiles where a layer is recomputed; of that one is there at a
        time."""
        share = largest_tile(tokens, TILE) / tokens if tokens else 1.0
        return cls(kept, inputs, number, narrow + (kept - narrow) * share)

    def most(self, recomputed: int) -> float:
        """Bytes at the worst moment: every layer's inputs where it is recomputed, one such layer in whole, all of the others; and
        what one layer's backward works with."""
        inside = self.inside if recomputed else 0.0
        each = (self.number - recomputed) * self.kept + recomputed * self.inputs + inside
        return min(self.number * self.kept, each) + GRADIENTS * (self.inside if recomputed == self.number else self.kept)

    def to_recompute(self, free: float) -> int:
        """Of so many layers, that the rest fits in `free`."""
        over = self.most(0) - free
        if over <= 0:
            return 0
        # the layer that is being recomputed is there in whole
        return min(self.number, math.ceil((over + self.inside) / max(self.kept - self.inputs, 1.0)))

    def to_keep_dense(self, free: float, recomputed: int, dense: float) -> int:
        """Of how many layers a dense copy of `dense` bytes has room beside all this.

        All this is an estimate: half of what seems left is not touched.
        """
        return max(0, min(self.number, math.floor((free - self.most(recomputed)) / 2 / max(dense, 1.0))))
