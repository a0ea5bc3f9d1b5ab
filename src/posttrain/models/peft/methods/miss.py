"""MiSS (Kang & Yin 2024, arXiv 2409.15371): one small matrix a layer, that stands for all blocks of its inputs."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Dropout
from posttrain.models.peft.base import Ranked
from posttrain.models.peft.tuners import Tuner, TunerKind


class Miss(Ranked, Tuner):
    """A shard of r rows, repeated over the inputs."""

    saves = TunerKind("miss", "MISS", marks="miss_", still=("miss_block", 0.0), added=True)
    own_parts = ("miss_",)
    on_quantized = True
    config = "MissConfig"
    own = {"r": "r", "dropout": "miss_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["miss"]
    dropout: Dropout


METHOD = Miss
