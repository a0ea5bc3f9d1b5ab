"""Bottleneck adapters as a method of peft's: h <- h + W_up ReLU(W_down h + b_down) + b_up on a sub-layer's output.

After attention and MLP (Houlsby et al. 2019, arXiv 1902.00751) or after the MLP alone (Pfeiffer et al. 2020, arXiv 2005.00247).
Importing this module makes peft know them: saving, loading, switching and disabling are peft's own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import register_peft_method
from torch import Tensor, nn
from torch.nn.functional import relu

from posttrain.errors import UserError
from posttrain.models.layers import fused_experts, shape_of
from posttrain.models.peft.targets import linears

if TYPE_CHECKING:
    from transformers import PreTrainedModel

NAME = "BOTTLENECK"


def _add_peft_type() -> None:
    """peft keeps its methods in a closed enum and has no way for one from outside; without it nothing could be registered."""
    if NAME in PeftType.__members__:
        return
    member = str.__new__(PeftType, NAME)
    member._name_, member._value_ = NAME, NAME
    type.__setattr__(PeftType, NAME, member)
    PeftType._member_names_.append(NAME)
    PeftType._member_map_[NAME] = member
    PeftType._value2member_map_[NAME] = member


_add_peft_type()


@dataclass
class BottleneckConfig(PeftConfig):
    """r: size of the bottleneck. target_modules: the sub-layers' output projections (see `output_projections`)."""

    r: int = field(default=64)
    target_modules: list[str] | str | None = field(default=None)
    exclude_modules: list[str] | str | None = field(default=None)
    modules_to_save: list[str] | None = field(default=None)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType(NAME)
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]


class BottleneckLayer(nn.Module, BaseTunerLayer):
    """Any linear layer, in 4 or 8 bit too: what is added depends on its output alone."""

    adapter_layer_names = ("bottleneck_down", "bottleneck_up")
    other_param_names = ("r",)

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.bottleneck_down, self.bottleneck_up = nn.ModuleDict(), nn.ModuleDict()
        self.r: dict[str, int] = {}
        self._disable_adapters = False
        self.merged_adapters: list[str] = []

    def update_layer(self, adapter_name: str, r: int, inference_mode: bool) -> None:
        """Add an adapter of this name to the layer."""
        width = shape_of(self.get_base_layer())[1]
        self.r[adapter_name] = r
        self.bottleneck_down[adapter_name] = nn.Linear(width, r)
        up = nn.Linear(r, width)
        nn.init.zeros_(up.weight)
        nn.init.zeros_(up.bias)
        self.bottleneck_up[adapter_name] = up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters or [adapter_name], inference_mode=inference_mode)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The layer's output, with the active adapters' change of it."""
        result = self.base_layer(x, *args, **kwargs)
        if self.disable_adapters:
            return result
        for name in self.active_adapters:
            if name in self.bottleneck_down:
                down, up = self.bottleneck_down[name], self.bottleneck_up[name]
                result = result + up(relu(down(result.to(down.weight.dtype)))).to(result.dtype)  # pyright: ignore
        return result


class BottleneckModel(BaseTuner):
    """peft's tuner."""

    prefix = "bottleneck_"
    tuner_layer_cls = BottleneckLayer

    def _create_and_replace(
        self, peft_config: Any, adapter_name: str, target: nn.Module, target_name: str, parent: nn.Module, current_key: str,
        *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        if isinstance(target, BottleneckLayer):
            target.update_layer(adapter_name, peft_config.r, peft_config.inference_mode)
            return
        layer = BottleneckLayer(target)
        layer._active_adapter = [adapter_name]
        layer.update_layer(adapter_name, peft_config.r, peft_config.inference_mode)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)
        self._replace_module(parent, target_name, layer, target)

    def _check_merge_allowed(self) -> None:
        raise UserError("peft.method: bottleneck adapters are not linear and cannot be merged; keep them beside the model")


register_peft_method(name=NAME.lower(), config_cls=BottleneckConfig, model_cls=BottleneckModel)


def moe_blocks(model: nn.Module) -> set[str]:
    """Names of the blocks that hold fused experts."""
    return {name.rpartition(".")[0].rpartition(".")[0] for name, _, _ in fused_experts(model)}


def output_projections(model: PreTrainedModel, placement: str) -> dict[str, nn.Module]:
    """The last linear layer of every MLP and, for houlsby, of every attention, whose output is as wide as the model.

    Raises UserError, with what the model has, where there is none.
    """
    wanted = ("mlp", "feed_forward", "ffn") + (("attn", "attention") if placement == "houlsby" else ())
    with_experts = moe_blocks(model)
    width, found = model.config.get_text_config().hidden_size, {}
    for name, module in linears(model).items():
        parts = name.split(".")
        block = next((i for i, part in enumerate(parts) if any(word in part for word in wanted)), None)
        if block is not None and ".".join(parts[: block + 1]) in with_experts:
            continue  # what comes out of it is no one layer's
        if block is not None and shape_of(module)[1] == width:
            found[".".join(parts[: block + 1])] = (name, module)  # a later one of the same sub-layer takes its place
    if not found:
        kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears(model)}))
        raise UserError(f"peft.placement: {type(model).__name__} has no attention or MLP by name, only {kinds}; use peft=lora")
    return dict(found.values())
