"""What a LoRA adds to a weight, as two factors: one matrix, or one for every expert."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Factors(NamedTuple):
    """The change b a of a layer; of fused experts b_e a_e of each, laid out as peft does it.

    Rows of `a` go by expert, then by rank: [experts * rank, in]. Columns of `b` go by rank, then by
    expert: [out, rank * experts].
    """

    a: Tensor
    b: Tensor
    experts: int = 1

    @property
    def rank(self) -> int:
        """Of one expert's change."""
        return len(self.a) // self.experts

    def times(self, scale: float) -> Factors:
        """`scale` times the change."""
        return self._replace(b=self.b * scale)

    def change(self) -> Tensor:
        """b a: [out, in], or [experts, out, in]."""
        if self.experts == 1:
            return self.b @ self.a
        a = self.a.reshape(self.experts, self.rank, -1)
        b = self.b.reshape(len(self.b), self.rank, self.experts)
        return torch.einsum("ore,eri->eoi", b, a)


def joined(parts: list[Factors]) -> Factors:
    """The sum of changes of one layer, exactly: ranks add up, expert by expert."""
    experts = parts[0].experts
    a = torch.cat([part.a.reshape(experts, part.rank, -1) for part in parts], dim=1).flatten(0, 1)
    b = torch.cat([part.b.reshape(len(part.b), part.rank, experts) for part in parts], dim=1).flatten(1, 2)
    return Factors(a, b, experts)
