"""What lies in a LoRA's files, whatever method of its family has left them."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.kinds import ROWS, ROWS_END, odd_setting, odd_tensor

if TYPE_CHECKING:
    from torch import Tensor

    from posttrain.models.peft.factors import Factors

UNDERSTOOD = {
    "r",
    "lora_alpha",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "fan_in_fan_out",
    "use_dora",
    ROWS,
    "target_parameters",
}


class LoraKind(AdapterKind):
    """A file of A [rank, in] and B [out, rank] of every layer, as all methods leave it whose change is their product."""

    is_sum = True
    is_added = True
    merges = True

    def holds(self, config: dict[str, Any]) -> bool:
        return super().holds(config) and not config.get("use_dora")

    def objection(self, config: dict[str, Any], tensors: Collection[str] = ()) -> str:
        return odd_setting(config, UNDERSTOOD) or odd_tensor(tensors, self.ends)

    @property
    def ends(self) -> tuple[str, ...]:
        """Of the names of a layer's tensors."""
        return (".lora_A.weight", ".lora_B.weight", ROWS_END)

    def layers(self, tensors: Collection[str]) -> list[str]:
        return sorted(name.removesuffix(".lora_B.weight") for name in tensors if name.endswith(".lora_B.weight"))

    def is_zero(self, adapter: Any) -> bool:
        return not any(bool(adapter.tensors[f"{layer}.lora_B.weight"].any()) for layer in adapter.modules)

    def changed(self, adapter: Any, layer: str, weight: Tensor) -> Tensor:
        return weight + self.factors(adapter, layer).change()

    def factors(self, adapter: Any, layer: str) -> Factors:
        """A layer's change as b a, in float32."""
        from posttrain.models.peft.factors import Factors

        a, b = (adapter.tensors[f"{layer}.lora_{half}.weight"].float() for half in "AB")
        r = _by_pattern(adapter.config, "rank_pattern", layer) or adapter.config["r"]
        experts = len(a) // r if adapter.config.get("target_parameters") else 1
        rank = len(a) // experts
        alpha = _by_pattern(adapter.config, "alpha_pattern", layer)
        alpha = adapter.config["lora_alpha"] if alpha is None else alpha
        return Factors(a, b * (alpha / (rank**0.5 if adapter.config.get("use_rslora") else rank)), experts)


def _by_pattern(config: dict[str, Any], which: str, layer: str) -> Any:
    """What an adapter_config.json says of one layer, which may stand there as its weight."""
    for key, value in (config.get(which) or {}).items():
        if any(matches(key, name) for name in (layer, f"{layer}.weight")):
            return value
    return None


def matches(pattern: str, name: str) -> bool:
    """Whether a key of a pattern means a layer, as peft has it: by the end of its name, from a dot on."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


LORA = LoraKind("lora", "LORA")
