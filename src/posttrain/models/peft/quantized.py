"""LoRA on packed experts, and on experts without values.

peft would put a parametrization of its own over the one that reads the packed weights, and cannot take it away again: changes of
earlier steps would pile up. Here the change is handed to the one that reads them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn.utils import parametrize

from posttrain.models.quantization.packed import Packed, packed_of, stored


class OnQuantized(ParamWrapper):
    """peft's layer, over a parameter that is packed."""

    def get_param(self) -> Tensor:
        """Something of the weight's shape, type and place: nothing is made of the packed one for that."""
        where = stored(self.get_base_layer(), self.parameter_name).device
        return torch.empty(1, dtype=self._weights.compute_dtype, device=where).expand(self._weights.shape)

    @property
    def _weights(self) -> Packed:
        found = packed_of(self.get_base_layer(), self.parameter_name)
        assert found
        return found

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        added = [self.get_delta_factors(name) for name in active_adapters if name in self.lora_A]
        weights, before = self._weights, self._weights.added
        weights.added = (*before, *added)
        try:
            yield
        finally:
            weights.added = before

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not here: a merged model is made of its files (models/peft/merge.py)."""
        raise NotImplementedError("an adapter cannot be merged into packed experts in memory")


class OnShapes(ParamWrapper):
    """peft's layer, over a parameter on the meta device, for which peft's own sum asks for an autocast that is not there."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        base: Any = self.get_base_layer()
        changes = [self.get_delta_weight(name) for name in active_adapters if name in self.lora_A]
        parametrize.register_parametrization(base, self.parameter_name, _Sum(changes), unsafe=True)
        try:
            with parametrize.cached():
                yield
        finally:
            parametrize.remove_parametrizations(base, self.parameter_name, leave_parametrized=False)


class _Sum(nn.Module):
    def __init__(self, changes: list[Tensor]) -> None:
        super().__init__()
        self.changes = changes

    def forward(self, weight: Tensor) -> Tensor:
        """With what is added to it, in one tensor."""
        for change in self.changes:
            weight = weight + change
        return weight


def read_packed(model: nn.Module) -> None:
    """Make every adapter on packed experts, or on experts without values, that peft has just put there, one that works."""
    for module in model.modules():
        if type(module) is ParamWrapper:
            base = module.get_base_layer()
            if hasattr(base, "parametrizations"):
                module.__class__ = OnQuantized
            elif module.get_param().is_meta:
                module.__class__ = OnShapes
