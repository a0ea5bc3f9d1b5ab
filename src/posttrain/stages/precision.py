"""In which number format a run computes on a device: one rule, for the run itself and for its plan."""

from __future__ import annotations

from typing import TypeVar

from posttrain.config.schema import Stage
from posttrain.devices.device import Device
from posttrain.errors import UserError

S = TypeVar("S", bound=Stage)


def settled(cfg: S, device: Device) -> tuple[S, str]:
    """The config with formats that the device computes in, and a line on what is another than it would be elsewhere.

    Raises UserError where bfloat16 was asked for by name and there is none.
    """
    if device.has_bfloat16:
        return cfg, ""
    major, minor = device.capability or (0, 0)
    why = f"{device.name} (compute capability {major}.{minor}) computes no bfloat16, which needs 8.0 (Ampere) and newer"
    if cfg.model.dtype == "bfloat16":
        raise UserError(f"model.dtype: {why}; say model.dtype=float32, or float16 where the model bears its narrow range")
    if cfg.train.precision == "bf16":
        raise UserError(f"train.precision: {why}; say train.precision=none")
    changed = []
    if cfg.base_dtype == "bfloat16":
        cfg = cfg.model_copy(update={"model": cfg.model.model_copy(update={"dtype": "float32"})})
        changed.append("model.dtype")
    instead = "float16" if cfg.model.dtype == "float16" else "float32"
    if getattr(cfg.quant, "compute_dtype", None) == "bfloat16":
        cfg = cfg.model_copy(update={"quant": cfg.quant.model_copy(update={"compute_dtype": instead})})
        changed.append("quant.compute_dtype")
    if not changed:
        return cfg, ""
    faster = "; model.dtype=float16 is faster and half as large, with scaled losses, where the model bears its narrow range"
    return cfg, f"{why}: {instead} in its place ({', '.join(changed)})" + (faster if instead == "float32" else "")


def computes_in_float16(cfg: Stage) -> bool:
    """Do gradients go through float16, so that losses must be scaled?"""
    return "float16" in (cfg.base_dtype, getattr(cfg.quant, "compute_dtype", None))


def autocast_of(cfg: Stage, device: Device) -> str:
    """bf16 or no, as accelerate calls it: only where the weights are float32 and the device does bfloat16 faster."""
    if cfg.train.precision != "auto":
        return {"none": "no", "bf16": "bf16"}[cfg.train.precision]
    full_precision = cfg.model.dtype == "float32" or (cfg.model.dtype == "auto" and cfg.peft.output == "model")
    return "bf16" if full_precision and device.kind == "cuda" and device.has_bfloat16 else "no"
