"""Where the host waits for the device, or has to do with numbers that lie elsewhere: seen on any device, a CPU too."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ASKS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}  # of operators whose result depends on numbers


class HostWaits(TorchDispatchMode):
    """found: names of operators called inside for which a GPU would be waited for, that copy between devices, or that talk to
    other processes."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if _asks(func, args) or "c10d" in func.namespace or len(_devices(func, (args, kwargs, out))) > 1:
            self.found.append(str(func))
        return out


def _asks(func: Any, args: Any) -> bool:
    if func.__name__.startswith("index"):  # by numbers, or by a mask, of which there are as many results as it has ones
        return any(x.dtype in (torch.bool, torch.uint8) for x in _tensors(args[1:2]))
    return bool(ASKS & set(func.tags))


def _devices(func: Any, used: Any) -> set[torch.device]:
    """A single number of the CPU may stand in any operator but a copy."""
    return {x.device for x in _tensors(used) if x.dim() or x.device.type != "cpu" or "copy" in func.__name__}


def _tensors(tree: Any) -> Iterator[Tensor]:
    return (x for x in tree_leaves(tree) if isinstance(x, Tensor))
