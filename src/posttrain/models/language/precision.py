"""A model in half precision that computes in float32 for a while, in little more memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import PreTrainedModel

IS_STREAMED = "is_streamed"  # of a layer that is not always in memory
TILE = 2**13  # rows of a weight that are in float32 at a time


@contextmanager
def in_float32(causal: PreTrainedModel) -> Iterator[None]:
    """Inside, half-precision weights compute in float32, a layer's at a time: what differs is then no rounding.

    Final norm and head are wide all the while: some models ask for their format before they call them. Where layers come
    and go (`train.offload=layers`), embedding and head stay narrow too, and are widened as far as they are read.
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

    lean = any(hasattr(part, IS_STREAMED) for part in layers)
    for part in others:
        if lean and isinstance(part, nn.Embedding):
            hooks.append(part.register_forward_hook(lambda _module, _inputs, output: output.float()))
        elif lean and type(part) is nn.Linear:
            hooks.append(_Instead(part, partial(_in_tiles, part)))
        else:
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


class _Instead:
    """A module's forward, until `remove`."""

    def __init__(self, module: nn.Module, forward: Any) -> None:
        self.module = module
        module.forward = forward

    def remove(self) -> None:
        del self.module.forward


def _in_tiles(module: nn.Linear, x: Tensor) -> Tensor:
    """What a linear layer gives, in float32."""
    found = torch.cat([linear(x.float(), rows.float()) for rows in module.weight.split(TILE)], -1)
    return found if module.bias is None else found + module.bias.float()


def _parts(module: nn.Module) -> tuple[list[nn.Module], list[nn.Module]]:
    """The modules that hold all weights between them: the layers of its lists, each whole, and all others with weights."""
    if isinstance(module, nn.ModuleList):
        return list(module), []
    if any(True for _ in module.parameters(recurse=False)) or hasattr(module, "token_adapter"):
        return [], [module]
    found = [_parts(child) for child in module.children()]
    return [layer for layers, _ in found for layer in layers], [other for _, others in found for other in others]
