"""What every part needs to know of tensors: how to have one whole, wherever it lies."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor that FSDP has sharded, every process must ask for it."""
    return undivided(tensor).detach().to("cpu", copy=True).contiguous()


def undivided(tensor: Tensor) -> Tensor:
    """Whole, where it lies; of a tensor that FSDP has sharded, every process must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def all_whole(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Each of them whole and on the CPU, by name, a tied one once; none where not `keep`. What FSDP has sharded is gathered a
    tensor at a time, for which every process must call it; what lies whole on the CPU is not copied."""
    found: dict[str, Tensor] = {}
    known: dict[int, Tensor] = {}
    for name, tensor in tensors.items():
        if id(tensor) not in known:
            value = undivided(tensor)
            known[id(tensor)] = value.detach().cpu() if keep else value.new_empty(0)
        found[name] = known[id(tensor)]
    return found if keep else {}


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, where the host need not wait until it is there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def here(tensor: Tensor) -> Tensor:
    """What of it lies in this process."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def first_not_finite(named: Iterable[tuple[str, Tensor]]) -> str:
    """Name of the first tensor that holds a NaN or an infinity, as far as it lies in this process; '' where none does."""
    for name, tensor in named:
        value = here(tensor)
        wide = value.is_floating_point() and value.element_size() > 1  # floats of 8 bit know no such test
        if wide and value.device.type != "meta" and not bool(value.isfinite().all()):
            return name
    return ""


def numbers_in(directory: Path) -> int:
    """How many numbers the safetensors of a directory hold."""
    import safetensors

    opened: Any = safetensors.safe_open
    found = 0
    for file in directory.glob("*.safetensors"):
        with opened(file, "pt") as tensors:
            found += sum(math.prod(tensors.get_slice(name).get_shape()) for name in tensors.keys())  # noqa: SIM118
    return found
