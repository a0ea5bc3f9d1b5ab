"""IA3 (Liu et al. 2022, arXiv 2205.05638): a factor for each output of a layer, or for each input of the last one of an MLP."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.models.peft.tuners import Tuner, TunerKind


class Ia3(Tuner):
    """One vector a layer."""

    saves = TunerKind("ia3", "IA3", marks="ia3_", still=("ia3_l", 1.0))
    own_parts = ("ia3_",)
    on_quantized = True
    config = "IA3Config"
    own = {}  # noqa: RUF012 (a ClassVar, as the base has it)
    method: Literal["ia3"]

    def settings(self, model: Any) -> dict[str, Any]:
        """Layers that end an MLP, and are wider than the model, have factors of their inputs, as in the paper."""
        from posttrain.models.peft.targets import module_names, suffixes

        narrowing = [name for name, layer in self.targets_in(model).layers.items() if _ends_mlp(name, layer.shape)]
        return {"feedforward_modules": suffixes(narrowing, module_names(model)) if narrowing else []}


METHOD = Ia3


def _ends_mlp(name: str, shape: tuple[int, int]) -> bool:
    return shape[0] > shape[1] and "attn" not in name and "attention" not in name
