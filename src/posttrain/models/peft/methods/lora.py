"""LoRA (Hu et al. 2021, arXiv 2106.09685): h = W0 x + (alpha / r) B A x, and what its variants have in common."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from posttrain.config.fields import Positive, Rate
from posttrain.config.interfaces import Quantizer
from posttrain.models.peft.base import Targeted, check_same, has_no_weights
from posttrain.models.peft.lora_kind import LORA, matches
from posttrain.models.peft.starts import STARTS, Start

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from posttrain.models.peft.factors import Factors
    from posttrain.models.peft.targets import Targets

SHORT, ALPHA = 100, 32  # steps below which LoRA's best rate is 15 and not 10 times full training's; alpha of those rates


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
    init: Literal["default", "pissa", "olora", "eva", "corda", "lora_ga", "loftq"]
    init_rows: Positive  # of the run's data, that a start reads which reads such
    rank_pattern: dict[str, Positive] | None  # by a regular expression over the ends of layers' names
    alpha_pattern: dict[str, Rate] | None

    @property
    def start(self) -> Start:
        """How it begins."""
        return STARTS[self.init]

    @property
    def writes_base(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Does its start take a part out of the base?"""
        return self.start.writes_base

    @property
    def reads(self) -> str:  # pyright: ignore[reportIncompatibleVariableOverride]
        """What of the run, if anything, its start asks for."""
        return self.start.reads

    @property
    def changes_start(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Not where what it begins with is zero, or is taken out of the base."""
        return not self.start.zero and not self.writes_base

    @property
    def on_quantized(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        return not self.writes_base

    @property
    def _as_usual(self) -> bool:
        return self.start.zero and not self.reads

    can_continue = on_parameters = for_vllm = _as_usual  # pyright: ignore

    @property
    def ranks_wide(self) -> int:
        return self.start.directions

    @property
    def named(self) -> str:
        return self.name if self._as_usual or self.name == self.init else f"{self.name} with peft.init={self.init}"

    @property
    def in_words(self) -> str:
        return super().in_words + (", which writes into the base" if self.writes_base else "")

    @property
    def plan_note(self) -> str:
        return f"peft.init={self.init}: {self.start.note}" if self.start.note else ""

    def check_base(self, quant: Quantizer) -> None:
        super().check_base(quant)
        if self.reads == "quantized" and not quant.is_quantized:
            raise ValueError(
                f"peft.init: {self.init} makes up for what quantizing the base has lost, and quant={quant.name}; say quant=nf4, "
                "or peft.init=default"
            )

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        start = True if has_no_weights(model) else self.start.option
        return self._config(model, self.targets_in(model), task, start)

    def _config(self, model: Any, targets: Targets, task: str | None, start: bool | str) -> Any:
        made = lora_config(self, model, targets, task, self.alpha, init_lora_weights=start, **self.options)
        made.rank_pattern, made.alpha_pattern = self._patterns("rank_pattern", model), self._patterns("alpha_pattern", model)
        return made

    def first_values(self, model: Any, given: Any) -> dict[str, Tensor]:
        found = self.start.values_of()(model, self._config(model, self.found_in(model), None, True), given)
        return {name: value.detach().float().cpu().contiguous() for name, value in found.items()}

    def begin(self, model: Any, values: dict[str, Tensor]) -> None:
        import torch

        from posttrain.models.peft.first_values import put

        put(model, values, self.writes_base, getattr(torch, self.dtype))
        self._ready(model)
        if self.writes_base:
            _remember_start(model)

    def record(self, model: PeftModel) -> dict[str, Any]:
        from posttrain.models.peft.attach import NEW
        from posttrain.models.peft.export import lora_layers

        ranks = {name: layer.r[NEW] for name, layer in lora_layers(model).items() if NEW in layer.r}
        return super().record(model) | ({"ranks": ranks} if self.reads and self.start.zero else {})

    def _patterns(self, key: str, model: Any) -> dict[str, Any]:
        """Raises UserError for one that no layer with an adapter matches."""
        from posttrain.errors import UserError, did_you_mean

        patterns, layers = getattr(self, key) or {}, self.found_in(model).layers
        for pattern in patterns:
            if not any(matches(pattern, name) for name in layers):
                near = did_you_mean(pattern, sorted({layer.short for layer in layers.values()}))
                raise UserError(f"peft.{key}: no layer that gets an adapter is called '{pattern}'{near}")
        return dict(patterns)

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        shapes_alone = has_no_weights(model)
        made = super().attach(model, num_steps, task)
        if self.writes_base and not self.reads and not shapes_alone:
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
        if not self.start.zero:
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


def lora_config(method: Targeted, model: Any, targets: Targets, task: str | None, alpha: float, **options: Any) -> Any:
    """peft's LoraConfig, of what the method goes on of a model."""
    from peft import LoraConfig

    from posttrain.console import say
    from posttrain.models.peft.export import whole_number
    from posttrain.models.peft.targets import layer_options

    common: dict[str, Any] = layer_options(targets, model) | {"task_type": task, "lora_alpha": whole_number(alpha)}
    dropout = 0.0 if targets.parameters else method.dropout  # which peft has for linear layers alone: see `Targeted.attach`
    if dropout != method.dropout:
        say("peft: no dropout on experts, whose products cannot be told from their input")
    return LoraConfig(r=method.r, lora_dropout=dropout, target_parameters=list(targets.parameters), **common, **options)
