"""HiRA (Huang et al. 2025, ICLR): the weight itself times B A, number by number, is added to it."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Dropout
from posttrain.models.peft.base import Ranked
from posttrain.models.peft.tuners import Tuner, TunerKind


class Hira(Ranked, Tuner):
    """A change of high rank of two factors of low rank: W * (B A)."""

    saves = TunerKind("hira", "HIRA", marks="hira_", still=("hira_B", 0.0))
    own_parts = ("hira_",)
    on_quantized = True
    config = "HiraConfig"
    own = {"r": "r", "dropout": "hira_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["hira"]
    dropout: Dropout


METHOD = Hira
