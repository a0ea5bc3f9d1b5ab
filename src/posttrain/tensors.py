"""What every part needs to know of tensors: how to have one whole, wherever it lies."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor


def whole(tensor: Tensor) -> Tensor:
    """A copy on the CPU; of a tensor that FSDP has sharded, every process must ask for it."""
    full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
    return full.detach().to("cpu", copy=True).contiguous()


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
            value = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            known[id(tensor)] = value.detach().cpu() if keep else value.new_empty(0)
        found[name] = known[id(tensor)]
    return found if keep else {}


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the CPU on `device`, where the host need not wait until it is there."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)
