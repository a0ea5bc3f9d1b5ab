"""What a model is made of, by kind and shape and not by the model's name: what adapters, quantizers and counts go by."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.models.language.architecture import outside_text
from posttrain.models.language.decoder import before_head, decoder_of
from posttrain.models.quantization.packed import packed_of, stored


class Kind(Enum):
    """Of a layer."""

    LINEAR = "linear layers"
    EXPERTS = "experts"
    BELOW = "experts one below another"  # all in one matrix, of which their users take parts (DBRX)
    ROUTER = "routers"
    STATE = "state projections"
    TOWER = "linear layers outside the language model"


class Layer(NamedTuple):
    """A linear layer, or with module=None a parameter that is a stack of them (fused experts) or works as one (a bare router).

    shape: (in, out), of one expert.
    """

    name: str
    kind: Kind
    module: nn.Module | None
    shape: tuple[int, int]

    @property
    def short(self) -> str:
        """What people call it: the last part of its name; of a parameter two."""
        parts = self.name.split(".")
        if self.module is not None:
            return parts[-1]
        return ".".join(parts[-3:-1] if parts[-1] == "weight" else parts[-2:])


def layers_of(model: nn.Module) -> dict[str, Layer]:
    """All that an adapter can go on, but for the output head, by its name in the model without adapters."""
    modules = {name.replace(".base_layer", ""): module for name, module in _plain_modules(model)}
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    experts = {name: _counts(module) for name, module in modules.items() if is_fused(module)}
    text, mixers, width = language_prefix(model), _state_mixers(modules), _width(model)
    skipped = {id(parameter) for parameter in outside_text(model).values()}
    found: dict[str, Layer] = {}
    for name, module in modules.items():
        if isinstance(module, (nn.Linear, Conv1D)):
            if module is not head:
                shape = shape_of(module)
                kind = Kind.TOWER if id(stored(module, "weight")) in skipped else _kind(name, shape, text, experts, mixers, width)
                found[name] = Layer(name, kind, module, shape)
            continue
        for parameter, shape in own_shapes(module).items():
            full, kind = f"{name}.{parameter}", Kind.EXPERTS if len(shape) == 3 else Kind.ROUTER
            below = name not in experts and "experts" in name.split(".") and len(shape) == 2
            if (name in experts and len(shape) == 3) or below or _is_bare_router(module, shape):
                kind = Kind.BELOW if below else kind
                kind = kind if full.startswith(text) else Kind.TOWER
                found[full] = Layer(full, kind, None, (shape[-1], shape[-2]))
    return found


def _kind(
    name: str, shape: tuple[int, int], text: str, experts: dict[str, set[int]], mixers: set[str], width: int | None
) -> Kind:
    if not name.startswith(text):
        return Kind.TOWER
    if "experts" in name.split(".")[:-1]:
        return Kind.EXPERTS
    if any(name.startswith(e.rpartition(".")[0] + ".") and shape[1] in counts for e, counts in experts.items()):
        return Kind.ROUTER
    if name.rpartition(".")[0] in mixers and shape[0] != width:
        return Kind.STATE
    return Kind.LINEAR


def shape_of(linear: Any) -> tuple[int, int]:
    """(in, out) of a Linear, a quantized one or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return tuple(linear.weight.shape)


def own_shapes(module: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shapes of a module's own parameters, in the order of their definition; of quantized ones those that they stand for."""
    found = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
    for name, held in getattr(module, "parametrizations", {}).items():
        packed = packed_of(module, name)
        found[name] = tuple(packed.shape if packed else held.original.shape)
    return found


def fused_experts(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """Full name, module and name within it of every parameter that holds one matrix for each expert."""
    for name, module in _plain_modules(model):
        if is_fused(module):
            for parameter, shape in own_shapes(module).items():
                if len(shape) == 3:
                    yield f"{name.replace('.base_layer', '')}.{parameter}", module, parameter


def language_prefix(model: Any) -> str:
    """What the names of the language model's layers begin with: text runs through nothing else."""
    if not hasattr(model, "get_decoder"):
        return ""
    if before_head(model):
        return ""
    decoder = decoder_of(model)
    name = next((name for name, module in model.named_modules() if module is decoder), "")
    inside = any(isinstance(module, (nn.Linear, Conv1D)) for module in decoder.modules()) if decoder is not None else False
    return f"{name}." if name and inside else ""


def _plain_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Those that a model had before adapters; the wrapped ones have `.base_layer` in their names."""
    wrapped = {name.partition(".base_layer")[0] for name, _ in model.named_modules() if name.endswith(".base_layer")}
    for name, module in model.named_modules():
        inner = name.partition(".base_layer")[0]
        if inner in wrapped and hasattr(module, "base_layer"):
            continue
        if not any(part.startswith("lora_") for part in name.split(".")):
            yield name, module


def is_fused(module: nn.Module) -> bool:
    """Does it own parameters that hold one matrix for each of its experts?"""
    counts = _counts(module)
    return bool(counts) and any(len(shape) == 3 and shape[0] in counts for shape in own_shapes(module).values())


def _counts(module: nn.Module) -> set[int]:
    """What it says of the number of its experts: of all, or of those that have weights."""
    return {value for name, value in vars(module).items() if "experts" in name and type(value) is int}


def _is_bare_router(module: nn.Module, shape: tuple[int, ...]) -> bool:
    return len(shape) == 2 and shape[0] == getattr(module, "num_experts", None) and not is_fused(module)


def _state_mixers(modules: dict[str, nn.Module]) -> set[str]:
    """Mamba's, by what they own; a gated delta net has no `D`."""
    return {name for name, module in modules.items() if {"A_log", "D"} <= set(own_shapes(module))}


def _width(model: Any) -> int | None:
    config: Any = getattr(model, "config", None)
    return getattr(config.get_text_config(), "hidden_size", None) if hasattr(config, "get_text_config") else None
