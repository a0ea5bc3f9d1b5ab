"""What methods have in common that are peft's own tuners, and none of LoRA's family: an adapter of theirs is trained, written and
merged by peft alone. Each method's file says what it is called there, and what it can do."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Placed, check_same
from posttrain.models.peft.kinds import odd_setting

if TYPE_CHECKING:
    from torch import Tensor

ONE = "layer"  # the layer of a model of one, on which a change is computed


@dataclass(frozen=True)
class TunerKind(AdapterKind):
    """Files of such an adapter. A layer's change is what peft makes of it on that layer alone.

    marks: how the names of its tensors go on after a layer's. still: the tensor that leaves a layer as it is, and its value.
    added: a layer's change does not depend on its weight.
    """

    marks: str = ""
    still: tuple[str, float] = ("", 0.0)
    added: bool = False
    merges = True

    @property
    def is_added(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `added` says."""
        return self.added

    def objection(self, config: dict[str, Any], tensors: Collection[str] = ()) -> str:
        odd = [name for name in tensors if f".{self.marks}" not in name and name != "score.weight"]
        return odd_setting(config, config) or (f"no merge is known of its {odd[0]}" if odd else "")

    def layers(self, tensors: Collection[str]) -> list[str]:
        return sorted({name.partition(f".{self.marks}")[0] for name in tensors if f".{self.marks}" in name})

    def is_zero(self, adapter: Any) -> bool:
        part, value = self.still
        held = [tensor for name, tensor in adapter.tensors.items() if f".{part}" in name]
        return bool(held) and all(bool((tensor == value).all()) for tensor in held)

    def changed(self, adapter: Any, layer: str, weight: Tensor) -> Tensor:
        import torch
        from peft import PeftConfig, get_peft_model, set_peft_model_state_dict
        from torch import nn

        own = {
            f"base_model.model.{ONE}{n.removeprefix(layer)}": t for n, t in adapter.tensors.items() if n.startswith(f"{layer}.")
        }
        config: Any = PeftConfig.from_peft_type(**adapter.config)
        config.target_modules, config.task_type, config.modules_to_save = [ONE], None, None
        config.base_model_name_or_path = None
        for patterns in (name for name in ("rank_pattern", "alpha_pattern", "block_size_pattern") if getattr(config, name, None)):
            setattr(config, patterns, _of_one(getattr(config, patterns), layer))
        if getattr(config, "fan_in_fan_out", False):
            config.fan_in_fan_out = False
        if hasattr(config, "feedforward_modules"):
            is_in = any(f".{layer}".endswith(f".{name}") for name in config.feedforward_modules)
            config.feedforward_modules = [ONE] if is_in else []
        alone = nn.Module()
        alone.add_module(ONE, nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.float32))
        alone.get_submodule(ONE).weight = nn.Parameter(weight.clone(), requires_grad=False)
        with torch.random.fork_rng():
            made: Any = get_peft_model(alone, config)  # pyright: ignore[reportArgumentType]
        set_peft_model_state_dict(
            made, {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in own.items()}
        )
        return made.merge_and_unload().get_submodule(ONE).weight.detach()


def _of_one(patterns: dict[str, Any], layer: str) -> dict[str, Any]:
    """What is said of a layer, said of the layer of a model of one."""
    import re

    found = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", layer)), None)
    return {} if found is None else {ONE: found}


class Tuner(Placed):
    """One of peft's own tuners.

    config: the class of peft that describes it. own: its settings here, by what they are called there. fixed: what peft is told
    beside them. free: settings that a run may change when it goes on with an adapter.
    """

    config: ClassVar[str]
    own: ClassVar[dict[str, str]]
    fixed: ClassVar[dict[str, Any]] = {}
    free: ClassVar[tuple[str, ...]] = ("dropout",)
    can_continue = True
    on_transposed = False

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        import peft

        from posttrain.models.peft.targets import layer_options

        made = getattr(peft, self.config)
        options: dict[str, Any] = layer_options(self.targets_in(model), model)
        options.pop("fan_in_fan_out")
        return made(task_type=task, **options, **self.settings(model), **self.fixed)

    def settings(self, model: Any) -> dict[str, Any]:
        """What peft's description is told of the settings here."""
        return {theirs: getattr(self, ours) for ours, theirs in self.own.items()}

    def check_continued(self, found: Any) -> None:
        for ours, theirs in self.own.items():
            if ours not in self.free:
                check_same(ours, getattr(found, theirs), getattr(self, ours))
