"""MiSS (Kang & Yin 2024, arXiv 2409.15371): one small matrix a layer, that stands for all blocks of its inputs."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.fields import Positive
from posttrain.models.peft.tuners import Tuner, TunerKind


class Miss(Tuner):
    """A shard of r rows, repeated over the inputs."""

    saves = TunerKind("miss", "MISS", marks="miss_", still=("miss_block", 0.0), added=True)
    own_parts = ("miss_",)
    on_quantized = True
    config = "MissConfig"
    own = {"r": "r", "dropout": "miss_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["miss"]
    r: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def least_width(self) -> int:
        return self.r


METHOD = Miss
