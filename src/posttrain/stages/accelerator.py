"""The processes and the precision of a run, by accelerate."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin

from posttrain.config.schema import Stage
from posttrain.errors import UserError
from posttrain.runs.directory import Run


def make_accelerator(cfg: Stage, run: Run) -> Accelerator:
    """With FSDP2 where the config, or accelerate's own, asks for it. UserError for a tracker that is not installed."""
    if cfg.tracker != "none" and find_spec(cfg.tracker) is None:
        raise UserError(f"tracker: {cfg.tracker} is not installed; pip install 'posttrain[{cfg.tracker}]'")
    fsdp = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap") if cfg.train.fsdp else None
    log_with = None if cfg.tracker == "none" else cfg.tracker
    accelerator = Accelerator(mixed_precision=_precision(cfg), log_with=log_with, project_dir=run.dir, fsdp_plugin=fsdp)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("train.fsdp: accelerate's config asks for FSDP version 1; set fsdp_version: 2 there")
        if not cfg.train.fsdp:
            raise UserError("train.fsdp: accelerate's config asks for FSDP; say train.fsdp=true too")
        plugin.cpu_ram_efficient_loading = False  # every process has read the weights
    return accelerator


def _precision(cfg: Stage) -> str:
    """Autocast, for accelerate: only where the weights are float32 and the device does bfloat16 faster."""
    if cfg.train.precision != "auto":
        return {"none": "no", "bf16": "bf16"}[cfg.train.precision]
    full_precision = cfg.model.dtype == "float32" or (cfg.model.dtype == "auto" and cfg.peft.output == "model")
    return "bf16" if full_precision and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
