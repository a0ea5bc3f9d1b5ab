"""What a PEFT method and a quantizer say of themselves: all that configs, stages and commands ask of them, and never their name.

The methods are the files of models/peft/methods, the quantizers those of models/quantization, and what installed packages add by
an entry point. What one does not say that it can do is refused. Their files import torch, peft and transformers inside
functions alone, for a config is checked without.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from posttrain.config.fields import Rate, Strict
from posttrain.registry import Registry

# what a method's first values can be worked out from, beside the base's weights, and in words
READS = {
    "rows": "the run's rows, as they go through its layers",
    "loss": "the gradient of a loss of single rows",
    "quantized": "what quantizing the base has lost",
}


class Quantizer(Strict):
    """How a frozen base is kept: `quant=`.

    is_quantized: in fewer bits than it was given in. is_readable: a method may ask for the weights that are stood for.
    for_images: the denoiser of a diffusion model can be kept so. packs_experts: fused experts are quantized too. comes_and_goes:
    layers kept so can leave memory and return (`train.offload=layers`).
    """

    is_quantized: ClassVar[bool] = True
    is_readable: ClassVar[bool] = False
    for_images: ClassVar[bool] = False
    packs_experts: ClassVar[bool] = False
    comes_and_goes: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """Its `quant.method`, which is a literal of each class."""
        return vars(self)["method"]

    @property
    def kept_dense(self) -> int | Literal["auto"]:
        """Of how many layers a copy in 16 bits is kept; auto: of as many as memory has room for."""
        return 0

    def loading(self, device: str) -> Any:
        """What transformers takes as `quantization_config`. Raises UserError where it cannot run on `device`."""
        raise NotImplementedError

    def try_out(self, device: str) -> bool:
        """Quantize a little: False where there is nothing to try. Raises UserError where it cannot run on `device`."""
        return False

    def quantize_blocks(self, model: Any, device: str) -> None:
        """Quantize the linear layers of a denoiser's blocks, in place. Raises UserError where it cannot run on `device`."""
        raise NotImplementedError

    def weight_bytes(self, shape: Collection[int]) -> tuple[float, float] | None:
        """(weights, constants) in bytes that a linear layer's weight of [out, in] takes; None where it stays as it is."""
        raise NotImplementedError

    def made(self, layer: Any) -> bool:
        """Is it one of the layers that this quantizer puts in place of linear ones?"""
        return False

    def dequantized(self, layer: Any) -> Any:
        """The weight [out, in] that a layer of `made` computes with."""
        raise NotImplementedError


@dataclass(frozen=True)
class AdapterKind:
    """What lies in an adapter's files, whatever method has made it, and what can be done with it.

    name: as errors say it. peft_type: as adapter_config.json says it. why_not: why it cannot be merged. virtual: what tokens it
    adds to a sequence, if any: a soft prompt's, or a prefix's keys and values.
    """

    name: str
    peft_type: str
    why_not: str = "how to merge it is not known"
    virtual: Literal["", "prompt", "prefix"] = ""
    is_sum: ClassVar[bool] = False  # a layer's change is B A, which others can be added to
    is_added: ClassVar[bool] = False  # a layer's change does not depend on its weight
    merges: ClassVar[bool] = False

    def holds(self, config: dict[str, Any]) -> bool:
        """Is an adapter with this adapter_config.json of this kind?"""
        return config.get("peft_type") == self.peft_type

    def objection(self, config: dict[str, Any], tensors: Collection[str] = ()) -> str:
        """Why an adapter with this adapter_config.json and these tensors cannot be merged; '' where it can."""
        return self.why_not

    def register(self) -> None:
        """Make peft know it, where it is none of peft's own."""

    def layers(self, tensors: Collection[str]) -> list[str]:
        """Names of the layers that an adapter with these tensors changes."""
        return []

    def is_zero(self, adapter: Any) -> bool:
        """Does the adapter (models/peft/merge.py) certainly change nothing?"""
        return False

    def factors(self, adapter: Any, layer: str) -> Any:
        """A layer's change as factors (models/peft/export.py), in float32, where it is a sum."""
        raise NotImplementedError

    def changed(self, adapter: Any, layer: str, weight: Any) -> Any:
        """A layer's weight [out, in], float32, with an adapter's change in it."""
        raise NotImplementedError


class Method(Strict):
    """What is trained, and how: `peft=`, with its settings.

    output: what a run of it leaves, weights of the model itself or an adapter in peft's format; saves: of what kind the adapter
    is. is_additive: a layer's change is B A throughout training, so it can lie on top of another's, and both are one of summed
    rank. writes_base: it changes weights of the base, at its start or in training. can_continue: it can go on with what a run of
    it has left. adds_tokens: it trains rows of the embedding and of the head, those of `model.add_tokens`. own_parts: what the
    names of parameters have in them that it adds to the base's modules. several_rates: not all that it trains has one rate.
    reads_weight: it computes with a layer's whole weight, which a quantized base must stand for. reads: what its first values are
    worked out from beside the base, of READS. changes_start: with its first values the model is another than the
    one that it is put on.
    """

    output: ClassVar[Literal["model", "adapter"]] = "adapter"
    saves: ClassVar[AdapterKind | None] = None
    is_additive: ClassVar[bool] = False
    writes_base: ClassVar[bool] = False
    can_continue: ClassVar[bool] = False
    on_quantized: ClassVar[bool] = False
    for_images: ClassVar[bool] = False
    for_ppo: ClassVar[bool] = False
    for_vllm: ClassVar[bool] = False
    for_fsdp: ClassVar[bool] = False
    adds_tokens: ClassVar[bool] = False
    several_rates: ClassVar[bool] = False
    reads_weight: ClassVar[bool] = False
    reads: ClassVar[str] = ""
    changes_start: ClassVar[bool] = False
    own_parts: ClassVar[tuple[str, ...]] = ()
    lr_factor: Rate

    @property
    def name(self) -> str:
        """Its `peft.method`, which is a literal of each class."""
        return vars(self)["method"]

    @property
    def named(self) -> str:
        """Its name, with the setting by which it differs from others of that name."""
        return self.name

    @property
    def in_words(self) -> str:
        """How it trains, at the end of a sentence."""
        return f"by {self.named}"

    @property
    def plan_note(self) -> str:
        """What a plan cannot know of it from shapes, or ''."""
        return ""

    def check_base(self, quant: Quantizer) -> None:
        """Raises ValueError where it cannot be trained on a base that is kept so."""
        if quant.is_quantized and not self.on_quantized:
            raise ValueError(f"quant={quant.name} cannot be trained {self.in_words}; add +peft=qlora, or say quant=none")
        if quant.is_quantized and self.reads_weight and not quant.is_readable:
            raise ValueError(
                f"quant={quant.name} cannot be trained by {self.name}, which has to read the whole weight; say quant=nf4"
            )

    def check_steps(self, num_steps: int) -> None:
        """Raises UserError where it cannot be trained in so few steps."""

    def with_targets(self, named: dict[str, str]) -> Self:
        """The same, with its targets spelt out where they are one of these names."""
        return self

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        """The model with what is trained, all else frozen. On the meta device: its shapes alone.

        num_steps: of the whole run, for a schedule. task: peft's name of what the model does; None: no language model.
        Raises UserError for targets that match nothing and ranks that do not fit.
        """
        raise NotImplementedError

    def first_values(self, model: Any, given: Any) -> dict[str, Any]:
        """Tensors by name, with which it begins on a base that it is not yet on. given: what `reads` asks for
        (models/peft/first_values.py). Raises UserError where there is too little of it."""
        return {}

    def begin(self, model: Any, values: dict[str, Any]) -> None:
        """Put them into what `attach` has made."""

    def continue_from(self, model: Any, adapter_dir: Path) -> Any:
        """The model with an adapter that a run of it has left, to train on. Raises UserError where that has other settings."""
        raise NotImplementedError

    def rate_of(self, parameter: str) -> float:
        """By what a parameter's learning rate differs from the run's."""
        return 1.0

    def auto_factors(self, num_steps: int) -> dict[str, float]:
        """By what the rate of `optim.lr=auto` is multiplied beside `lr_factor`, and why."""
        return {}

    def step_callback(self, model: Any) -> Any:
        """What it does in an optimizer step (training/objective.py: StepCallback), or None."""
        return None

    def record(self, model: Any) -> dict[str, Any]:
        """What the manifest says of a trained model, beside the settings."""
        return {}

    def export(self, model: Any, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """Write the adapter. Every process must call it; one of them writes."""
        raise NotImplementedError

    def sums(self, model: Any) -> tuple[float, dict[str, Any]] | None:
        """A scale, and over it each layer's whole change as factors (models/peft/export.py); None where it is no sum."""
        return None

    def image_tensors(self, model: Any) -> dict[str, Any] | None:
        """The tensors of a change that is no sum, as diffusers loads them; None where only peft does."""
        return None

    def owns(self, parameter: str) -> bool:
        """Has the method added the parameter of this name, within the base's modules?"""
        return any(part in parameter for part in self.own_parts)


METHODS: Registry[type[Method]] = Registry(
    "posttrain.models.peft.methods", "posttrain.peft_methods", "METHOD", "peft method", of=f"{__name__}:Method"
)
QUANTIZERS: Registry[type[Quantizer]] = Registry(
    "posttrain.models.quantization",
    "posttrain.quantizers",
    "QUANTIZER",
    "quantizer",
    shared=("experts", "packed"),
    of=f"{__name__}:Quantizer",
)
REGISTRIES = (METHODS, QUANTIZERS)  # whose entries may come from packages that bring YAML files of their own
