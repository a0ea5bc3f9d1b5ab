"""HiRA (Huang et al. 2025, ICLR): the weight itself times B A, number by number, is added to it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.fields import Positive
from posttrain.models.peft.tuners import Tuner, TunerKind


class Hira(Tuner):
    """A change of high rank of two factors of low rank: W * (B A)."""

    saves = TunerKind("hira", "HIRA", marks="hira_", still=("hira_B", 0.0))
    own_parts = ("hira_",)
    on_quantized = True
    config = "HiraConfig"
    own = {"r": "r", "dropout": "hira_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["hira"]
    r: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def least_width(self) -> int:
        return self.r


METHOD = Hira
