"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from posttrain.config.choices import Schedule

MOMENTS = 8  # bytes a trained number, in float32
# From here on moments are worth paging: LoRA of rank 16 on 8 billion weights has 0.31 GiB of them, of rank 64 1.25.
LARGE_MOMENTS = 2**30
SMALLEST_IN_8_BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bit
BLOCK_OF_MOMENTS = 256  # that share a constant


def make_optimizer(
    name: str, module: nn.Module, lr_ratio: Callable[[str], float],
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float,
) -> tuple[Optimizer, str | None]:  # fmt: skip
    """The optimizer, and a line to show when it is not the one that was asked for.

    bitsandbytes' 8-bit and paged optimizers exist on CUDA; elsewhere plain AdamW takes their place (see `in_place_of`). Weight
    decay leaves out vectors (norms, biases), as is usual. lr_ratio: parameter name -> its learning rate divided by the run's.
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for full_name, p in module.named_parameters():
        if p.requires_grad:
            grouped.setdefault((weight_decay if p.ndim >= 2 else 0.0, lr_ratio(full_name)), []).append(p)
    groups = [{"params": ps, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), ps in grouped.items()]
    params = [p for group in grouped.values() for p in group]
    kind, numbers = params[0].device.type, sum(p.numel() for p in params)
    used, note = optimizer_used(name, numbers, kind, any(isinstance(p, DTensor) for p in params))
    if used == "adamw":
        fused = kind == "cuda" or all(p.dtype == torch.float32 for p in params)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused), note
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

    kinds = {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW32bit}
    return kinds[name](groups, lr=lr, betas=betas, eps=eps), None


def in_place_of(name: str, numbers: int, on_cuda: bool, sharded: bool = False) -> str:
    """'' or why plain AdamW takes the place of this optimizer. numbers: that are trained."""
    if name == "adamw":
        return ""
    if sharded:
        return "does not shard (train.fsdp)"
    if not on_cuda:
        return "needs CUDA"
    size = MOMENTS * numbers
    if name.startswith("paged_") and size < LARGE_MOMENTS:
        return f"waits for the device at every weight, to page moments that would take {size / 2**30:.2f} GiB"
    return ""


def optimizer_used(name: str, numbers: int, kind: str, sharded: bool) -> tuple[str, str | None]:
    """What `optim.name` comes to for so many trained numbers on a device of this kind, as torch calls it, and a line where that
    is not what was asked for."""
    if why := in_place_of(name, numbers, kind == "cuda", sharded):
        return "adamw", f"optim={name} {why}; plain AdamW takes its place here"
    return name, None


def moment_bytes(used: str, numbers: int, itemsize: int) -> float:
    """AdamW's two moments of one tensor. used: by `optimizer_used`. itemsize: of the tensor's own numbers."""
    if used == "adamw":
        return 2.0 * numbers * itemsize
    if "8bit" in used and numbers >= SMALLEST_IN_8_BIT:
        return 2.0 * (numbers + 4 * -(-numbers // BLOCK_OF_MOMENTS))
    return 2.0 * numbers * 4


def lr_factor(schedule: Schedule, step: int, num_steps: int, warmup_steps: int) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0): a pure function, so resuming needs no state.

    Warm-up is linear and its first step is not zero; linear and cosine end at zero one step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    done = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return 1.0 - done if schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
