"""C3A (Chen et al. 2024, arXiv 2407.19342): the change is made of circulant blocks, which one row of each describes."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Positive
from posttrain.models.peft.tuners import Tuner, TunerKind


class C3A(Tuner):
    """Circular convolutions: a high rank of few numbers."""

    saves = TunerKind("c3a", "C3A", marks="c3a_", still=("c3a_kernel", 0.0), added=True)
    own_parts = ("c3a_",)
    on_quantized = True
    config = "C3AConfig"
    own = {"block_size": "block_size"}  # noqa: RUF012 (a ClassVar, as the base has it)
    fixed = {"init_weights": True}  # noqa: RUF012
    method: Literal["c3a"]
    block_size: Positive

    def misfit(self, size_in: int, size_out: int) -> str:
        odd = size_in % self.block_size or size_out % self.block_size
        return f"peft.block_size={self.block_size} does not divide their sides" if odd else ""


METHOD = C3A
