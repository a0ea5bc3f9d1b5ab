"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): a LoRA for each of k x k blocks of a weight."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from posttrain.config.fields import Positive, Rate
from posttrain.models.peft.tuners import Tuner, TunerKind


class Gralora(Tuner):
    """Blocks of low rank, which together have a high one."""

    saves = TunerKind("gralora", "GRALORA", marks="gralora_", still=("gralora_B", 0.0), added=True)
    own_parts = ("gralora_",)
    on_quantized = True
    config = "GraloraConfig"
    own = {"r": "r", "alpha": "alpha", "k": "gralora_k", "dropout": "gralora_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["gralora"]
    r: Positive
    alpha: Rate
    k: Positive  # blocks a side
    dropout: Annotated[float, Field(ge=0, lt=1)]

    @property
    def least_width(self) -> int:
        return self.r

    def misfit(self, size_in: int, size_out: int) -> str:
        return f"peft.k={self.k} does not divide their sides" if size_in % self.k or size_out % self.k else ""


METHOD = Gralora
