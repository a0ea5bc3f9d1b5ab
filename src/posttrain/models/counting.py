"""How many parameters a model has and trains, of which part, and what of a quantized base is still in 16 bit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from posttrain.models.quantization.packed import packed_of, stored

# part -> what a name has in it that is of this part; "=" before a word means that a whole part of the name is that word
PARTS = {
    "experts": ("=experts",),
    "routers": ("router", "=gate", "=wg"),
    "attention": ("attn", "attention"),
    "state-space layers": ("mamba", "mixer", "ssm", "rg_lru", "temporal_block", "conv"),
    "MLP": ("mlp", "feed_forward", "ffn", "shared_expert", "moe", "fc1", "fc2"),
    "embeddings": ("embed", "=wte", "=wpe"),
    "head": ("lm_head", "=score", "=head"),
    "norms": ("norm", "ln_"),
    "virtual tokens": ("prompt_encoder",),
}


class Counted(NamedTuple):
    """A parameter. numbers: that it stands for, where it is quantized. size: bytes."""

    name: str
    parameter: nn.Parameter
    numbers: int
    size: float
    is_packed: bool


def counted(model: nn.Module) -> Iterator[Counted]:
    """Every parameter once."""
    shapes = {id(stored(module, name)): shape for module, name, shape in _packed(model)}
    for name, parameter in model.named_parameters():
        state = getattr(parameter, "quant_state", None)
        shape = shapes.get(id(parameter), parameter.shape) if state is None else state.shape
        packed = not parameter.dtype.is_floating_point
        yield Counted(name, parameter, shape.numel(), parameter.numel() * parameter.element_size(), packed)


def _packed(model: nn.Module) -> Iterator[tuple[nn.Module, str, torch.Size]]:
    for module in model.modules():
        for name in getattr(module, "parametrizations", {}):
            if packed := packed_of(module, name):
                yield module, name, packed.shape


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trained, total) parameters; a 4-bit weight counts the parameters that it stands for, a shared one counts once."""
    every = list(counted(model))
    return sum(each.numbers for each in every if each.parameter.requires_grad), sum(each.numbers for each in every)


def part_of(name: str) -> str:
    """Of a parameter, by its name: the first of `PARTS` that is in it."""
    words = name.lower().split(".")
    for part, marks in PARTS.items():
        if any(word == mark[1:] if mark[0] == "=" else mark in word for mark in marks for word in words):
            return part
    return "other"


def trained_parts(model: nn.Module) -> dict[str, int]:
    """How many parameters are trained of each part, the most first."""
    found: dict[str, int] = {}
    for each in counted(model):
        if each.parameter.requires_grad:
            found[part_of(each.name)] = found.get(part_of(each.name), 0) + each.numbers
    return dict(sorted(found.items(), key=lambda pair: -pair[1]))


def left_in_16_bit(model: nn.Module) -> tuple[float, dict[str, float]] | None:
    """Of a quantized base: the share of its bytes that is in 16 bit or more, and those bytes by part; else None."""
    frozen = [each for each in counted(model) if not each.parameter.requires_grad and ".lora_" not in each.name]
    if not any(each.is_packed for each in frozen):
        return None
    left: dict[str, float] = {}
    for each in frozen:
        if not each.is_packed:
            left[part_of(each.name)] = left.get(part_of(each.name), 0.0) + each.size
    share = sum(left.values()) / sum(each.size for each in frozen)
    return share, dict(sorted(left.items(), key=lambda pair: -pair[1]))


def in_words(model: nn.Module) -> list[str]:
    """For the first lines of a run."""
    trained, total = count_parameters(model)
    parts = ", ".join(f"{part} {numbers:,}" for part, numbers in trained_parts(model).items())
    lines = [f"training {trained:,} of {total:,} parameters ({trained / total:.2%}): {parts}"]
    if found := left_in_16_bit(model):
        share, left = found
        sizes = ", ".join(f"{part} {size / 1e9:.2g} GB" for part, size in left.items())
        lines.append(f"{share:.0%} of the quantized base's bytes are still in 16 bit or more ({sizes})")
    return lines


def record(model: nn.Module) -> dict[str, Any]:
    """For a run's manifest."""
    trained, total = count_parameters(model)
    found = left_in_16_bit(model)
    said = {"trained": trained, "total": total, "parts": trained_parts(model)}
    return said | ({"left_in_16_bit": round(found[0], 4)} if found else {})
