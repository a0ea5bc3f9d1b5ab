"""Adapters on weights that several layers share (Zamba's block of attention): one change of one weight, in all of its layers.

Each layer has its own wrapper of peft's, and a file has each by its name, so plain peft computes the same; but their tensors are
one, for there is one place to merge them into.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.errors import UserError
from posttrain.models.layers import Layer
from posttrain.models.quantization.packed import stored


def followers(model: nn.Module) -> Iterator[tuple[Any, Any]]:
    """peft's layers on a weight that an earlier one is on too, each after that one."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    first: dict[int, Any] = {}
    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "token_indices"):
            weight = stored(module.get_base_layer(), getattr(module, "parameter_name", "weight"))
            if (leader := first.setdefault(id(weight), module)) is not module:
                yield leader, module


def share(model: nn.Module, adapter: str) -> None:
    """Make the adapter of this name one wherever it is on one weight."""
    for leader, layer in followers(model):
        for kind, held in _held(layer, adapter):
            held[adapter] = getattr(leader, kind)[adapter]


def check_shared(model: nn.Module, adapter: str) -> None:
    """Raises UserError where an adapter changes one weight in several ways, as one that was trained elsewhere may."""
    for leader, layer in followers(model):
        for kind, held in _held(layer, adapter):
            if not all(map(torch.equal, _values(held[adapter]), _values(getattr(leader, kind)[adapter]))):
                raise UserError(
                    "init: layers of its base share a weight, and its adapter changes it in each of them otherwise; train a new "
                    "one over it with chain.mode=stack"
                )


def silence_followers(model: nn.Module) -> None:
    """What is on a shared weight is merged into it once."""
    for _, layer in followers(model):
        layer.set_adapter([])


def shared_weights(layers: Iterable[Layer]) -> set[str]:
    """Names of those linear layers whose weight another one has too."""
    found: dict[int, list[str]] = {}
    for layer in layers:
        if layer.module is not None:
            found.setdefault(id(stored(layer.module, "weight")), []).append(layer.name)
    return {name for names in found.values() if names[1:] for name in names}


def _held(layer: Any, adapter: str) -> Iterator[tuple[str, Any]]:
    for kind in layer.adapter_layer_names:
        held = getattr(layer, kind, None)
        if isinstance(held, (nn.ModuleDict, nn.ParameterDict)) and adapter in held:
            yield kind, held


def _values(held: Any) -> list[Tensor]:
    return [held] if isinstance(held, Tensor) else list(held.parameters())
