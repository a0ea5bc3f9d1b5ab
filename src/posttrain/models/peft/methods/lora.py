"""LoRA (Hu et al. 2021, arXiv 2106.09685): h = W0 x + (alpha / r) B A x, and what its variants have in common."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.config.fields import Rate
from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Targeted, check_same
from posttrain.models.peft.kinds import ROWS, ROWS_END, odd_setting, odd_tensor

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from posttrain.models.peft.factors import Factors

SHORT, ALPHA = 100, 32  # steps below which LoRA's best rate is 15 and not 10 times full training's; alpha of those rates
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
        if any(re.fullmatch(rf"(.*\.)?({key})", name) for name in (layer, f"{layer}.weight")):
            return value
    return None


LORA = LoraKind("lora", "LORA")


def lora_factors(num_steps: int, alpha: float) -> dict[str, float]:
    """Of `optim.lr=auto`. alpha: by which B A is scaled, times the rank. While B is small a step changes a layer by as much as
    alpha and rate together say; at alpha / r the best rate is the same for every rank."""
    short = {f"fewer than {SHORT} steps": 1.5} if num_steps < SHORT else {}
    return short | ({f"alpha {alpha:g} at 1/r": ALPHA / alpha} if alpha != ALPHA else {})


class SavedAsLora(Targeted):
    """Whatever it trains, what it leaves is a plain LoRA: the whole change from the base, in float32."""

    saves = LORA
    own_parts = ("lora_",)
    on_quantized = True
    for_images = True
    alpha: Rate

    def not_found_again(self, model: Any) -> Any:
        from posttrain.models.peft.names import unwritable

        return lambda names: unwritable(model, names)

    def export(self, model: PeftModel, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """A frozen adapter and the new one become one of their summed rank, exactly: B A = [B_init B_new] [A_init; A_new]."""
        from posttrain.models.peft.attach import NEW
        from posttrain.models.peft.export import write_lora
        from posttrain.models.peft.tokens import write_rows

        config: Any = model.peft_config[NEW]
        scale, layers = self.sums(model)
        if is_writer:
            write_lora(layers, scale, out_dir, base_path, model.get_base_model(), config.fan_in_fan_out)
            write_rows(model, NEW, out_dir)

    def sums(self, model: PeftModel) -> tuple[float, dict[str, Factors]]:
        """A scale, and each layer's whole change over it as factors."""
        raise NotImplementedError


class LoraFamily(SavedAsLora):
    """B A throughout: variants differ in how they start, scale or learn."""

    is_additive = True
    on_parameters = True
    can_continue = True
    adds_tokens = True
    for_ppo = True
    for_vllm = True
    for_fsdp = True
    options: ClassVar[dict[str, Any]] = {}  # of peft's LoraConfig

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        return lora_config(self, model, task, self.alpha, **self.options)

    def check_continued(self, found: Any) -> None:
        super().check_continued(found)
        root, asked_root = (self.r**0.5 if rooted else self.r for rooted in (found.use_rslora, self.options.get("use_rslora")))
        check_same("alpha", found.lora_alpha / root * asked_root, self.alpha)

    def auto_factors(self, num_steps: int) -> dict[str, float]:
        return lora_factors(num_steps, self.alpha * (self.r**0.5 if self.options.get("use_rslora") else 1))

    def sums(self, model: PeftModel) -> tuple[float, dict[str, Factors]]:
        from posttrain.models.peft.attach import NEW
        from posttrain.models.peft.export import lora_layers

        layers = lora_layers(model)
        scale = next(layer.scaling[NEW] for layer in layers.values() if NEW in layer.scaling)
        return scale, {name: self.joined(layer, scale) for name, layer in layers.items()}

    def joined(self, layer: Any, scale: float) -> Factors:
        """A layer's frozen adapter, if it has one, and its new one as one."""
        from posttrain.models.peft.attach import INIT, NEW
        from posttrain.models.peft.factors import Factors, joined
        from posttrain.tensors import whole

        parts = []
        for name in (name for name in (INIT, NEW) if name in layer.lora_A):
            a, b = (whole(half[name].weight).float() for half in (layer.lora_A, layer.lora_B))
            parts.append(Factors(a, b * (layer.scaling[name] / scale), getattr(layer, "num_experts", 1)))
        return joined(parts)


class Lora(LoraFamily):
    """Plain LoRA."""

    method: Literal["lora"]


METHOD = Lora


def lora_config(method: Targeted, model: Any, task: str | None, alpha: float, **options: Any) -> Any:
    """peft's LoraConfig. Raises UserError for targets that match nothing or cannot be trained."""
    from peft import LoraConfig

    from posttrain.console import say
    from posttrain.models.peft.export import whole_number
    from posttrain.models.peft.targets import layer_options

    targets = method.targets_in(model)
    common: dict[str, Any] = layer_options(targets, model) | {"task_type": task, "lora_alpha": whole_number(alpha)}
    dropout = 0.0 if targets.parameters else method.dropout  # which peft has for linear layers alone: see `Targeted.attach`
    if dropout != method.dropout:
        say("peft: no dropout on experts, whose products cannot be told from their input")
    return LoraConfig(r=method.r, lora_dropout=dropout, target_parameters=list(targets.parameters), **common, **options)
