"""GraLoRA (Jung et al. 2025, arXiv 2505.20355): a LoRA for each of k x k blocks of a weight."""

from __future__ import annotations

from typing import Literal

from posttrain.config.fields import Dropout, Positive, Rate
from posttrain.models.peft.base import Ranked
from posttrain.models.peft.tuners import Tuner, TunerKind


class Gralora(Ranked, Tuner):
    """Blocks of low rank, which together have a high one."""

    saves = TunerKind("gralora", "GRALORA", marks="gralora_", still=("gralora_B", 0.0), added=True)
    own_parts = ("gralora_",)
    on_quantized = True
    config = "GraloraConfig"
    own = {"r": "r", "alpha": "alpha", "k": "gralora_k", "dropout": "gralora_dropout"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["gralora"]
    alpha: Rate
    k: Positive  # blocks a side
    dropout: Dropout

    def misfit(self, size_in: int, size_out: int) -> str:
        return f"peft.k={self.k} does not divide their sides" if size_in % self.k or size_out % self.k else ""


METHOD = Gralora
