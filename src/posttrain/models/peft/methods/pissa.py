"""PiSSA (Meng et al. 2024, arXiv 2404.02948): LoRA that starts from the principal components, which leave the base."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from posttrain.models.peft.base import has_no_weights
from posttrain.models.peft.methods.lora import LoraFamily, lora_config

if TYPE_CHECKING:
    from posttrain.models.peft.factors import Factors


class Pissa(LoraFamily):
    """LoRA that starts from the weights' principal components."""

    writes_base = True
    on_parameters = False
    can_continue = False
    on_quantized = False
    for_vllm = False
    method: Literal["pissa"]

    @property
    def in_words(self) -> str:
        return "by pissa, which writes into the base"

    def auto_factors(self, num_steps: int) -> dict[str, float]:
        return {}  # B is not zero at the start

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        # a randomised SVD: exact ones of large matrices take minutes
        start = True if has_no_weights(model) else "pissa_niter_16"
        return lora_config(self, model, task, self.alpha, init_lora_weights=start)

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        shapes_alone = has_no_weights(model)
        made = super().attach(model, num_steps, task)
        if not shapes_alone:
            _remember_start(made)
        return made

    def joined(self, layer: Any, scale: float) -> Factors:
        """Without what it began with, if it is this layer's adapter."""
        from posttrain.models.peft.factors import Factors, joined

        found = super().joined(layer, scale)
        if not hasattr(layer, "taken"):
            return found
        return joined([found, Factors(layer.taken.a.float(), -layer.taken.b.float())])


METHOD = Pissa


def _remember_start(model: Any) -> None:
    """Keep what was taken from the base: the change is what the adapter has become beyond it."""
    from posttrain.models.peft.attach import NEW
    from posttrain.models.peft.export import lora_layers
    from posttrain.models.peft.factors import Factors

    for layer in lora_layers(model).values():
        if NEW in layer.lora_A:
            halves = (layer.lora_A[NEW], layer.lora_B[NEW])
            layer.taken = Factors(*(half.weight.detach().cpu().clone() for half in halves))
