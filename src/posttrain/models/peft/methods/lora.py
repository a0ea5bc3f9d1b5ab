"""LoRA (Hu et al. 2021, arXiv 2106.09685): h = W0 x + (alpha / r) B A x, and what its variants have in common."""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.config.fields import Positive, Rate
from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Targeted, check_same, has_no_weights
from posttrain.models.peft.kinds import ROWS, ROWS_END, odd_setting, odd_tensor
from posttrain.models.peft.starts import STARTS

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
        if any(_matches(key, name) for name in (layer, f"{layer}.weight")):
            return value
    return None


def _matches(pattern: str, name: str) -> bool:
    """As peft has it: the end of a name, from a dot on."""
    return re.fullmatch(rf"(.*\.)?({pattern})", name) is not None


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
    adds_tokens = True
    for_ppo = True
    for_fsdp = True
    options: ClassVar[dict[str, Any]] = {}  # of peft's LoraConfig
    init: Literal["default", "pissa", "olora"]
    rank_pattern: dict[str, Positive] | None  # by a regular expression over the ends of layers' names
    alpha_pattern: dict[str, Rate] | None

    @property
    def writes_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Does its start take a part out of the base?"""
        return STARTS[self.init].writes_base

    @property
    def _leaves_base(self) -> bool:
        return not self.writes_base

    can_continue = on_quantized = on_parameters = for_vllm = _leaves_base  # pyright: ignore

    @property
    def in_words(self) -> str:
        if not self.writes_base:
            return super().in_words
        return f"by {self.name}{'' if self.name == self.init else f' with peft.init={self.init}'}, which writes into the base"

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        start = True if has_no_weights(model) else STARTS[self.init].option
        made = lora_config(self, model, task, self.alpha, init_lora_weights=start, **self.options)
        made.rank_pattern, made.alpha_pattern = self._patterns("rank_pattern", model), self._patterns("alpha_pattern", model)
        return made

    def _patterns(self, key: str, model: Any) -> dict[str, Any]:
        """Raises UserError for one that no layer with an adapter matches."""
        from posttrain.errors import UserError, did_you_mean

        patterns, layers = getattr(self, key) or {}, self._found_in(model).layers
        for pattern in patterns:
            if not any(_matches(pattern, name) for name in layers):
                near = did_you_mean(pattern, sorted({layer.short for layer in layers.values()}))
                raise UserError(f"peft.{key}: no layer that gets an adapter is called '{pattern}'{near}")
        return dict(patterns)

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        shapes_alone = has_no_weights(model)
        made = super().attach(model, num_steps, task)
        if self.writes_base and not shapes_alone:
            _remember_start(made)
        return made

    def check_continued(self, found: Any) -> None:
        from posttrain.errors import UserError

        super().check_continued(found)
        for key in ("rank_pattern", "alpha_pattern"):
            if getattr(self, key):
                raise UserError(f"peft.{key}: chain.mode=continue goes on with the ranks that the adapter has; leave it out")
        root, asked_root = (self.r**0.5 if rooted else self.r for rooted in (found.use_rslora, self.options.get("use_rslora")))
        check_same("alpha", found.lora_alpha / root * asked_root, self.alpha)

    def auto_factors(self, num_steps: int) -> dict[str, float]:
        if self.writes_base:  # B is not zero at the start
            return {}
        return lora_factors(num_steps, self.alpha * (self.r**0.5 if self.options.get("use_rslora") else 1))

    def sums(self, model: PeftModel) -> tuple[float, dict[str, Factors]]:
        from posttrain.models.peft.attach import NEW
        from posttrain.models.peft.export import lora_layers

        layers = lora_layers(model)
        scale = next(layer.scaling[NEW] for layer in layers.values() if NEW in layer.scaling)
        return scale, {name: self.joined(layer, scale) for name, layer in layers.items()}

    def joined(self, layer: Any, scale: float) -> Factors:
        """A layer's frozen adapter, if it has one, and its new one as one, without what that took from the base at its start."""
        from posttrain.models.peft.attach import INIT, NEW
        from posttrain.models.peft.factors import Factors, joined
        from posttrain.tensors import whole

        parts = []
        for name in (name for name in (INIT, NEW) if name in layer.lora_A):
            a, b = (whole(half[name].weight).float() for half in (layer.lora_A, layer.lora_B))
            parts.append(Factors(a, b * (layer.scaling[name] / scale), getattr(layer, "num_experts", 1)))
        if hasattr(layer, "taken"):
            parts.append(Factors(layer.taken.a.float(), layer.taken.b.float() * (-layer.scaling[NEW] / scale)))
        return joined(parts)


def _remember_start(model: Any) -> None:
    """Keep what was taken from the base: the change is what the adapter has become beyond it."""
    from posttrain.models.peft.attach import NEW
    from posttrain.models.peft.export import lora_layers
    from posttrain.models.peft.factors import Factors

    for layer in lora_layers(model).values():
        if NEW in layer.lora_A:
            halves = (layer.lora_A[NEW], layer.lora_B[NEW])
            layer.taken = Factors(*(half.weight.detach().cpu().clone() for half in halves))


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
