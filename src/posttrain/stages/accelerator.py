"""The processes and the precision of a run, by accelerate."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from accelerate import Accelerator, DistributedType

from posttrain.config.schema import Stage
from posttrain.devices.device import Device
from posttrain.errors import UserError, of_all
from posttrain.stages.precision import autocast_of
from posttrain.training.trackers import require_installed


def make_accelerator(cfg: Stage, device: Device) -> Accelerator:
    """Raises UserError for a tracker that is not installed, and for sharding that would be none."""
    require_installed(cfg.tracker)
    accelerator = Accelerator(mixed_precision=autocast_of(cfg, device))
    if accelerator.distributed_type == DistributedType.FSDP:
        raise of_all(UserError("train.fsdp: accelerate's config asks for FSDP; leave that out there, and say train.fsdp=true"))
    if cfg.train.fsdp and accelerator.num_processes == 1:
        raise UserError("train.fsdp: there is one process, and nothing to shard over; say train.processes=2, or train.fsdp=false")
    return accelerator


@contextmanager
def products_beside_autocast(autocast: str, device: torch.device) -> Iterator[None]:
    """Inside, products that autocast leaves in float32 (the head's gradients) are in TF32 on CUDA, which is more exact than the
    bfloat16 of all others. Who asks for float32 alone gets all of it."""
    before = torch.get_float32_matmul_precision()
    if device.type == "cuda" and autocast == "bf16":
        torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
