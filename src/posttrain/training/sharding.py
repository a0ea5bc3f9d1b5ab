"""FSDP by torch's own `fully_shard`: each process keeps its part of every weight, gradient and moment, on any device."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from posttrain.console import say
from posttrain.errors import RunError, of_all


def shard(module: nn.Module, layers: Iterable[nn.Module], device: torch.device, bf16: bool, wide: bool = False) -> nn.Module:
    """The module, its parameters in parts over all processes. Each of `layers`, those within others last, is whole only while it
    is computed. bf16: gathered and computed in bfloat16, gradients added up in float32. wide: parameters are made float32, a
    layer at a time, where their files have fewer bits.

    Raises RunError where a parameter stays whole: nothing is called sharded that is not.
    """
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")  # which nobody writes into
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bf16 else MixedPrecisionPolicy()
    options: dict[str, Any] = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "mp_policy": policy}
    for layer in reversed(list(layers)):
        _widen(layer, wide)
        fully_shard(layer, **options, reshard_after_forward=True)
    _widen(module, wide)
    fully_shard(module, **options, reshard_after_forward=True)  # the root too: names and optimizer know its parts alone
    if plain := [name for name, p in module.named_parameters() if not isinstance(p, DTensor)]:
        raise of_all(RunError(f"train.fsdp: {plain[0]} (and {len(plain) - 1} more) is not sharded; say train.fsdp=false"))
    say(f"sharded over {dist.get_world_size()} processes: {_held(module):,} of {_all(module):,} parameters in each")
    return module


def _widen(module: nn.Module, wide: bool) -> None:
    for p in module.parameters() if wide else ():
        if not isinstance(p, DTensor):
            p.data = p.data.float()


def _held(module: nn.Module) -> int:
    """Numbers that lie in this process."""
    return sum(p.to_local().numel() for p in module.parameters() if isinstance(p, DTensor))


def _all(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
