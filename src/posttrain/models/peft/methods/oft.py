"""OFT (Qiu et al. 2023, arXiv 2306.07280; OFTv2: 2025, arXiv 2506.19847): the inputs of each layer are turned, block by block."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Positive
from posttrain.models.peft.tuners import Tuner, TunerKind


class Oft(Tuner):
    """An orthogonal matrix for each block of a layer's inputs."""

    saves = TunerKind("oft", "OFT", marks="oft_", still=("oft_R", 0.0))
    own_parts = ("oft_",)
    on_quantized = True
    config = "OFTConfig"
    own = {"block_size": "oft_block_size"}  # noqa: RUF012 (a ClassVar, as the base has it)
    fixed = {"r": 0, "use_cayley_neumann": False}  # noqa: RUF012
    method: Literal["oft"]
    block_size: Positive

    def misfit(self, size_in: int, size_out: int) -> str:
        return f"peft.block_size={self.block_size} does not divide their inputs" if size_in % self.block_size else ""


METHOD = Oft
