"""SHiRA (Bhardwaj et al. 2024, arXiv 2406.13175): some numbers of each weight, drawn at random, are trained as they are."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config.fields import NonNegative, Positive
from posttrain.models.peft.tuners import Tuner, TunerKind


class Shira(Tuner):
    """A sparse change: as many numbers of a weight as LoRA of rank r has."""

    saves = TunerKind("shira", "SHIRA", marks="shira_", still=("shira_weight", 0.0), added=True)
    own_parts = ("shira_",)
    on_quantized = True
    reads_weight = True
    config = "ShiraConfig"
    own = {"r": "r", "seed": "random_seed"}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["shira"]
    r: Positive
    seed: NonNegative  # of the places

    def misfit(self, size_in: int, size_out: int) -> str:
        numbers = self.r * (size_in + size_out)
        return "" if numbers <= size_in * size_out else f"they have fewer numbers than shira of r={self.r} would train"

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        import torch

        from posttrain.models.peft.base import has_no_weights

        torch.sparse.check_sparse_tensor_invariants.disable()  # as it is anyway; said, or torch warns of it
        made = super().peft_config(model, num_steps, task)
        if has_no_weights(model):
            made.mask_fn = None  # places are drawn where there is something to draw from
        return made


METHOD = Shira
