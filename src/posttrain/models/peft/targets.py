"""Which layers an adapter goes on."""

from __future__ import annotations

import re
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.errors import UserError


def matched(model: nn.Module, targets: str | list[str]) -> dict[str, nn.Module]:
    """The linear layers that `targets` (all-linear, names, or a regular expression) means. UserError where it means none."""
    there = linears(model)
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in there}))
    if isinstance(targets, str):
        try:
            found = {n: m for n, m in there.items() if targets == "all-linear" or re.fullmatch(targets, n)}
        except re.error as error:
            raise UserError(f"peft.targets: '{targets}' is no regular expression ({error})") from error
        missing = [] if found else [targets]
    else:
        found = {n: m for n, m in there.items() if any(f".{n}".endswith(f".{t}") for t in targets)}
        missing = [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in there)]
    if missing or not found:
        raise UserError(f"peft.targets: no linear layer matches '{', '.join(missing)}'; this model has {kinds} (all-linear: all)")
    return found


def check_rank(key: str, rank: int, layers: dict[str, nn.Module]) -> None:
    """Raises UserError, about `key`, for a rank that the smallest of `layers` cannot have."""
    name, smallest = min(((n, min(linear_shape(m))) for n, m in layers.items()), key=lambda pair: pair[1])
    if rank > smallest:
        raise UserError(f"{key}: {rank} is above the smaller side ({smallest}) of {name}; use at most {smallest}")


def is_transposed(layers: dict[str, nn.Module]) -> bool:
    """Whether the layers keep their weight as [in, out], as GPT-2's do."""
    return all(isinstance(module, Conv1D) for module in layers.values())


def layer_options(layers: dict[str, nn.Module], model: nn.Module) -> dict[str, Any]:
    """What every config of peft's is told of the layers to go on."""
    return {"target_modules": suffixes(layers, model), "fan_in_fan_out": is_transposed(layers)}


def suffixes(chosen: dict[str, Any], model: nn.Module) -> list[str]:
    """The shortest names that mean exactly `chosen`: last parts where those reach nothing else, else full names."""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return last if reached == set(chosen) else sorted(chosen)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """What an adapter can go on: the linear layers (quantized ones too), but for the output head."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None  # pyright: ignore
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".lora_" not in n}
    return {n.removesuffix(".base_layer"): m for n, m in found.items() if m is not head}


def linear_shape(linear: nn.Module) -> tuple[int, int]:
    """(in, out) of a Linear, a quantized one or a Conv1D."""
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return tuple(linear.weight.shape)  # pyright: ignore
