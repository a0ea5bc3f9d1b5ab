"""A model in half precision that computes in float32 for a while, in little more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def in_float32(causal: PreTrainedModel) -> Iterator[None]:
    """Inside, half-precision weights compute in float32, a layer's at a time: what differs is then no rounding.

    Final norm and head are wide all the while: some models ask for their format before they call them.
    """
    layers, others = _parts(causal)
    hooks: list[Any] = []
    four_bit: list[Any] = [module for module in causal.modules() if hasattr(module, "compute_dtype")]
    before = [module.compute_dtype for module in four_bit]
    kept: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}

    def widen(module: nn.Module, *_: Any) -> None:
        kept[id(module)] = [(p, p.data) for p in module.parameters() if p.dtype in (torch.bfloat16, torch.float16)]
        for parameter, data in kept[id(module)]:
            parameter.data = data.float()

    def narrow(module: nn.Module, *_: Any) -> None:
        for parameter, data in kept.pop(id(module), []):
            parameter.data = data

    for part in others:
        widen(part)
    for part in layers:
        hooks += [part.register_forward_pre_hook(widen), part.register_forward_hook(narrow)]
    for module in four_bit:
        module.compute_dtype = torch.float32
    try:
        with torch.autocast(causal.device.type, enabled=False):
            yield
    finally:
        for hook in hooks:
            hook.remove()
        for part in (*layers, *others):
            narrow(part)
        for module, dtype in zip(four_bit, before, strict=True):
            module.compute_dtype = dtype


def _parts(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that hold all weights between them: the layers of its lists, each whole, and all others with weights."""
    if isinstance(module, nn.ModuleList):
        return list(module), []
    if any(True for _ in module.parameters(recurse=False)) or hasattr(module, "token_adapter"):
        return [], [module]
    found = [_parts(child) for child in module.children()]
    return [layer for layers, _ in found for layer in layers], [other for _, others in found for other in others]
