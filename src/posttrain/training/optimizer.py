"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from posttrain.config.choices import Schedule
from posttrain.errors import UserError, of_all

MOMENTS = 8  # bytes a trained number, in float32
# From here on moments are worth paging: LoRA of rank 16 on 8 billion weights has 0.31 GiB of them, of rank 64 1.25.
LARGE_MOMENTS = 2**30
SMALLEST_IN_8_BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bit
BLOCK_OF_MOMENTS = 256  # that share a constant
WAITS = "waits for the device at every weight"
Kept = Literal["adamw", "bitsandbytes"]  # whose moments a checkpoint has


def make_optimizer(
    name: str, module: nn.Module, lr_ratio: Callable[[str], float],
    *, lr: float, betas: tuple[float, float], eps: float, weight_decay: float, kept: Kept | None = None,
) -> tuple[Optimizer, str | None]:  # fmt: skip
    """The optimizer, and a line to show when it is not the one that was asked for.

    bitsandbytes' 8-bit and paged optimizers exist on CUDA; elsewhere plain AdamW takes their place (see `in_place_of`). Weight
    decay leaves out vectors (norms, biases), as is usual. lr_ratio: parameter name -> its learning rate divided by the run's.
    kept: see `going_on`.
    """
    grouped: dict[tuple[float, float], list[nn.Parameter]] = {}
    for full_name, p in module.named_parameters():
        if p.requires_grad:
            grouped.setdefault((weight_decay if p.ndim >= 2 else 0.0, lr_ratio(full_name)), []).append(p)
    groups = [{"params": ps, "weight_decay": decay, "lr_ratio": ratio} for (decay, ratio), ps in grouped.items()]
    params = [p for group in grouped.values() for p in group]
    kind, numbers = params[0].device.type, sum(p.numel() for p in params)
    used, note = optimizer_used(name, numbers, kind, any(isinstance(p, DTensor) for p in params))
    if kept:
        used, note = going_on(name, used, note, kept)
    if used == "adamw":
        fused = kind == "cuda" or all(p.dtype == torch.float32 for p in params)
        return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused), note
    return bitsandbytes_optimizer(used)(groups, lr=lr, betas=betas, eps=eps), note


def bitsandbytes_optimizer(name: str) -> Callable[..., Optimizer]:
    """The class for a name of `optim` other than adamw."""
    from bitsandbytes.optim.adamw import AdamW8bit, PagedAdamW8bit, PagedAdamW32bit

    return {"adamw_8bit": AdamW8bit, "paged_adamw_8bit": PagedAdamW8bit, "paged_adamw_32bit": PagedAdamW32bit}[name]


def make_moments(optimizer: Optimizer) -> None:
    """Have all of an optimizer's state now, as its first step would make it: then a step allocates nothing on CUDA, and
    cannot end half applied for want of memory. What is there already, of a checkpoint, stays."""
    for number, group in enumerate(optimizer.param_groups):
        for position, p in enumerate(group["params"]):
            if optimizer.state[p]:
                continue
            if hasattr(optimizer, "init_state"):  # bitsandbytes
                optimizer.init_state(group, p, number, position)  # type: ignore[attr-defined]
                continue
            counter = torch.zeros((), dtype=torch.float32, device=p.device if group.get("fused") else "cpu")
            moments = {slot: torch.zeros_like(p, memory_format=torch.preserve_format) for slot in ("exp_avg", "exp_avg_sq")}
            optimizer.state[p] = {"step": counter, **moments}


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
        return f"{WAITS}, to page moments that would take {size / 2**30:.2f} GiB"
    return ""


def optimizer_used(name: str, numbers: int, kind: str, sharded: bool) -> tuple[str, str | None]:
    """What `optim.name` comes to for so many trained numbers on a device of this kind, as torch calls it, and a line where that
    is not what was asked for."""
    if why := in_place_of(name, numbers, kind == "cuda", sharded):
        return "adamw", f"optim={name} {why}; plain AdamW takes its place here"
    return name, None


def going_on(name: str, used: str, note: str | None, kept: Kept) -> tuple[str, str | None]:
    """As `optimizer_used`, for a run that goes on from a checkpoint: with the moments that it has. kept: whose those are.

    Raises UserError where this machine cannot go on with them."""
    if kept == "adamw":
        line = f"optim={name}: the run began with plain AdamW, whose moments are in its checkpoint, and goes on with it"
        return "adamw", note or (None if used == "adamw" else line)
    if used != "adamw" or (note and WAITS in note):
        return name, None  # it waits at every weight, and its moments are there
    raise of_all(
        UserError(
            f"run.dir: the checkpoint has the moments of bitsandbytes' optimizer, and {note or 'optim=adamw is asked for'}; go "
            "on where it began, or begin anew in another run.dir"
        )
    )


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
