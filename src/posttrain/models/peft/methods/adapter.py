"""Bottleneck adapters after attention and MLP (Houlsby et al. 2019, arXiv 1902.00751) or after the MLP alone (Pfeiffer et al.
2020, arXiv 2005.00247). How peft is taught them is in models/peft/bottleneck.py."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config.fields import Positive
from posttrain.config.interfaces import AdapterKind
from posttrain.console import say
from posttrain.models.peft.base import Adapted, check_same, has_no_weights


class BottleneckKind(AdapterKind):
    """Files of bottleneck adapters, which peft does not know by itself."""

    def register(self) -> None:
        import posttrain.models.peft.bottleneck  # noqa: F401


class Bottleneck(Adapted):
    """Bottleneck layers after attention and MLP, or after the MLP alone."""

    saves = BottleneckKind("bottleneck", "BOTTLENECK", "bottleneck adapters are not linear")
    own_parts = ("bottleneck_",)
    can_continue = True
    on_quantized = True
    for_ppo = True
    method: Literal["adapter"]
    r: Positive
    placement: Literal["houlsby", "pfeiffer"]

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from posttrain.models.peft.attach import TASK
        from posttrain.models.peft.bottleneck import BottleneckConfig, moe_blocks, output_projections
        from posttrain.models.peft.targets import module_names, suffixes

        layers = output_projections(model, self.placement)
        if (blocks := moe_blocks(model)) and not has_no_weights(model):
            say(f"peft: no adapter after {len(blocks)} MLPs with experts: what comes out of them is no one layer's")
        return BottleneckConfig(r=self.r, target_modules=suffixes(layers, module_names(model)), task_type=TASK)

    def check_continued(self, found: Any) -> None:
        check_same("r", found.r, self.r)

    placed_by = "placement"

    def places(self, model: Any) -> set[str]:
        from posttrain.models.peft.bottleneck import output_projections

        return set(output_projections(model, self.placement))


METHOD = Bottleneck
