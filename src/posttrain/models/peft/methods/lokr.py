"""LoKr (Yeh et al. 2023, arXiv 2309.14859): the change is a Kronecker product, whose larger factor has low rank."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Positive, Rate
from posttrain.models.peft.tuners import Tuner, TunerKind


class LoKr(Tuner):
    """A Kronecker product in place of a matrix product."""

    saves = TunerKind("lokr", "LOKR", marks="lokr_", still=("lokr_w1", 0.0), added=True)
    own_parts = ("lokr_",)
    config = "LoKrConfig"
    own = {"r": "r", "alpha": "alpha"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["lokr"]
    r: Positive
    alpha: Rate


METHOD = LoKr
