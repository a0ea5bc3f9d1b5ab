"""LoHa (Hyeon-Woo et al. 2021, arXiv 2108.06098; LyCORIS: arXiv 2309.14859): the product, number by number, of two low ranks."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Rate
from posttrain.models.peft.base import Ranked
from posttrain.models.peft.tuners import Tuner, TunerKind


class LoHa(Ranked, Tuner):
    """(B1 A1) * (B2 A2), of rank up to r squared."""

    saves = TunerKind("loha", "LOHA", marks="hada_", still=("hada_w2_b", 0.0), added=True)
    own_parts = ("hada_",)
    config = "LoHaConfig"
    own = {"r": "r", "alpha": "alpha"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["loha"]
    alpha: Rate


METHOD = LoHa
