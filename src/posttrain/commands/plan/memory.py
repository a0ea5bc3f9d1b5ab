"""How many bytes a run will hold, from a model without weights: counted where it can be, never guessed from a rule of thumb."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.devices.device import Device
from posttrain.models.checkpoints.use import NONE_HELD, HeldBytes
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.activations import Activations, activations, llama_like, model_of_shapes
from posttrain.models.layers import fused_experts
from posttrain.models.offload.store import layer_names
from posttrain.models.peft.targets import linears
from posttrain.stages.precision import autocast_of
from posttrain.training.optimizer import optimizer_used, state_bytes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def adamw_bytes(numbers: float, itemsize: int = 4) -> float:
    """Full training with AdamW: weights, gradients and two moments."""
    return 4 * numbers * itemsize


@dataclass(frozen=True)
class Counted:
    """Of one device, in bytes, before the layers of weights are dealt to several. kept: by a micro-batch. layers: how many there
    are; gathered: the largest of them and what lies in none, which FSDP has whole while they are computed. inputs: a layer's, of
    one token. head: of so many tokens. quantized: numbers that are made 16 bit in every pass."""

    parts: dict[str, float]
    kept: Activations
    total_parameters: int
    trained_parameters: int
    layers: int
    gathered: float
    inputs: float
    head: Callable[[int], float]
    quantized: float
    optimizer: str
    note: str | None


def count(
    cfg: Any, device: Device, config: Any, tokens: int, sequences: int, frozen_adapter: float, held: HeldBytes = NONE_HELD
) -> Counted:
    """tokens: of the largest micro-batch, in `sequences` documents. frozen_adapter: bytes of an adapter underneath. held: weights
    that stay in the checkpoint's own format."""
    model = model_of_shapes(config, DTYPES[cfg.base_dtype], cfg.peft)
    base: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    experts = [module._parameters[own] for _, module, own in fused_experts(base)] if cfg.quant.packs_experts else []
    gone = _gone(base, device) if cfg.train.offload == "layers" else frozenset[int]()
    found = tally(cfg, device, model, base, [*(_base(module).weight for module in linears(base).values()), *experts], gone)
    autocast = torch.bfloat16 if autocast_of(cfg, device) == "bf16" else None
    kept = _activations(cfg, model, tokens, sequences, type(base).__name__, autocast)
    found.parts["weights"] -= held.numbers * DTYPES[cfg.base_dtype].itemsize
    found.parts["quantized weights"] += held.codes
    found.parts["quantization constants"] += held.constants
    parts = found.parts | {"frozen adapter": frozen_adapter}
    text = config.get_text_config()
    if (dense := cfg.quant.kept_dense) != "auto":  # which takes no more than is left
        parts["dense copies"] = (
            4.0 * found.parts["quantized weights"] * min(1.0, dense / text.num_hidden_layers)
        )  # of half a byte
    head: Tensor = base.get_output_embeddings().weight
    size = partial(head_bytes, head, device=device.kind)
    return Counted(
        parts, kept, found.total, found.trained, text.num_hidden_layers, _gathered(model, base),
        float(text.hidden_size * DTYPES[cfg.base_dtype].itemsize), size, 2 * found.parts["quantized weights"], found.optimizer,
        found.note,
    )  # fmt: skip


def _gone(base: nn.Module, device: Device) -> frozenset[int]:
    """The parameters of layers that are not in memory while one computes; on a card the next one is on its way there."""
    layers = [base.get_submodule(name) for name in layer_names(base)]
    here = 2 if device.kind == "cuda" else 1
    return frozenset(id(p) for layer in layers[here:] for p in layer.parameters())


def _gathered(model: nn.Module, base: Any) -> float:
    """One layer while it is computed and the next, which is on its way; what lies in no layer stays whole."""
    names = set(getattr(base, "_no_split_modules", None) or ())
    layers = [_bytes(module.parameters()) for module in base.modules() if type(module).__name__ in names]
    return _bytes(model.parameters()) - sum(layers) + 2 * max(layers, default=0.0)


def _bytes(parameters: Iterable[Tensor]) -> float:
    return float(sum(p.numel() * p.element_size() for p in parameters))


def _activations(cfg: Any, model: Any, tokens: int, sequences: int, kind: str, autocast: torch.dtype | None) -> Activations:
    """Of the model; where its class asks for values, which there are none of here, of a Llama of the same sizes."""
    try:
        return activations(model, tokens, sequences, cfg.model.kernels, autocast)
    except (RuntimeError, ValueError, TypeError, AttributeError, LookupError, AssertionError):
        stand_in = model_of_shapes(llama_like(model.config), DTYPES[cfg.base_dtype], cfg.peft)
        found = activations(stand_in, tokens, sequences, cfg.model.kernels, autocast)
        return found._replace(
            reading=f"activations and operations are those of a Llama of the same sizes: {kind} asks for values"
        )


class Tally(NamedTuple):
    """Bytes of weights, gradients and optimizer by part, and how many parameters there are and are trained. optimizer: the one
    that is used; note: where that is not the one that was asked for."""

    parts: dict[str, float]
    total: int
    trained: int
    optimizer: str
    note: str | None


def tally(
    cfg: Any, device: Device, model: nn.Module, base: nn.Module, quantizable: list[Any], gone: Collection[int] = frozenset()
) -> Tally:
    """base: the model within, which a method may be on; quantizable: the weights that `quant=` takes. gone: ids of parameters of
    layers whose weights are elsewhere, unless they are the method's."""
    linear = {id(weight) for weight in quantizable}
    weights = quantized = constants = adapters = gradients = 0.0
    total = trained = 0
    numbers = sum(p.numel() for p in {id(p): p for p in model.parameters()}.values() if p.requires_grad)
    used, note = optimizer_used(cfg.optim.name, numbers, device.kind, cfg.train.fsdp)
    own = {id(p) for name, p in base.named_parameters() if not cfg.peft.owns(name)}
    for p in {id(p): p for p in model.parameters()}.values():
        numbers, size = p.numel(), p.numel() * p.element_size()
        total += numbers
        if p.requires_grad:
            trained += numbers
            gradients += size
        if id(p) not in own:
            adapters += size
        elif id(p) in gone:
            continue
        elif id(p) in linear and (kept := cfg.quant.weight_bytes(p.shape)):
            quantized, constants = quantized + kept[0], constants + kept[1]
        else:
            weights += size
    parts = {"weights": weights, "quantized weights": quantized, "quantization constants": constants, "adapters": adapters}
    return Tally(parts | {"gradients": gradients, "optimizer": state_bytes(used, model)}, total, trained, used, note)


def _base(module: Any) -> Any:
    return module.base_layer if hasattr(module, "base_layer") else module
