"""DoRA (Liu et al. 2024, arXiv 2402.09353): LoRA on the direction of a weight's rows, and a magnitude a row."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.fields import Rate
from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Targeted, check_same, has_no_weights
from posttrain.models.peft.lora_kind import LoraKind
from posttrain.models.peft.methods.lora import lora_config, lora_factors

if TYPE_CHECKING:
    from torch import Tensor


class DoraKind(LoraKind):
    """Files of LoRA factors with a magnitude for each row."""

    is_sum = False
    is_added = False

    def holds(self, config: dict[str, Any]) -> bool:
        return AdapterKind.holds(self, config) and bool(config.get("use_dora"))

    @property
    def ends(self) -> tuple[str, ...]:
        return (*super().ends, ".lora_magnitude_vector")

    def is_zero(self, adapter: Any) -> bool:
        return False

    def changed(self, adapter: Any, layer: str, weight: Tensor) -> Tensor:
        """Eq. 5: the magnitude of every row is learned."""
        import torch

        changed = super().changed(adapter, layer, weight)
        magnitude = adapter.tensors[f"{layer}.lora_magnitude_vector"].float().reshape(-1, 1)
        return magnitude * changed / torch.linalg.vector_norm(changed, dim=1, keepdim=True)


class Dora(Targeted):
    """LoRA on the direction of a weight, with a magnitude for each row."""

    saves = DoraKind("dora", "LORA")
    own_parts = ("lora_", "magnitude")
    can_continue = True
    adds_tokens = True
    on_quantized = True
    reads_weight = True
    for_images = True
    for_ppo = True
    method: Literal["dora"]
    alpha: Rate

    def auto_factors(self, num_steps: int) -> dict[str, float]:
        return lora_factors(num_steps, self.alpha)

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        return lora_config(self, model, self.targets_in(model), task, self.alpha, use_dora=not has_no_weights(model))

    def check_continued(self, found: Any) -> None:
        super().check_continued(found)
        check_same("alpha", found.lora_alpha, self.alpha)

    def not_found_again(self, model: Any) -> Any:
        from posttrain.models.peft.names import misread, renamed

        return lambda names: renamed(model, names) | misread(model, names)

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        shapes_alone = has_no_weights(model)
        made = super().attach(model, num_steps, task)
        if shapes_alone:
            self._add_magnitudes(made)
        return made

    def _add_magnitudes(self, model: Any) -> None:
        """peft computes them from weights; without such, their shapes."""
        import torch

        from posttrain.models.peft.attach import NEW

        seen = set[int]()
        for module in list(model.modules()):
            if NEW in getattr(module, "lora_B", {}) and id(module.lora_B[NEW]) not in seen:
                seen.add(id(module.lora_B[NEW]))
                size, dtype = module.lora_B[NEW].out_features, getattr(torch, self.dtype)
                module.register_parameter("magnitude", torch.nn.Parameter(torch.empty(size, dtype=dtype, device="meta")))

    def image_tensors(self, model: Any) -> dict[str, Tensor]:
        """W' = m (W + s B A) / |W + s B A|: the scale goes into B, the magnitude is a vector of its own."""
        from peft import get_peft_model_state_dict

        from posttrain.models.peft.attach import NEW

        config, found = model.peft_config[NEW], {}
        for key, value in get_peft_model_state_dict(model, adapter_name=NEW).items():
            kept = value.detach().float().cpu()
            scaled = kept * (config.lora_alpha / config.r) if ".lora_B." in key else kept
            found[key.removeprefix("base_model.model.")] = scaled.contiguous()
        return found


METHOD = Dora
