"""Checkpoints: complete or absent, verified when read, and without a pickle.

checkpoints/step-000040/ holds weights.safetensors (what is trained), optimizer.safetensors, method.safetensors (what AdaLoRA
remembers; empty for others), and checkpoint.json with the step, the run's counters, and size and sha256 of the files. There is no
random state in it: every step is seeded from the run's seed and its number.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from posttrain.errors import RunError, UserError
from posttrain.rundir import sha256
from posttrain.tensors import whole

RECORD = "checkpoint.json"
FILES = ("weights.safetensors", "optimizer.safetensors", "method.safetensors")


@dataclass
class Checkpoint:
    """One read back: trainable tensors, optimizer state and the method's state by name, and the counters of the run."""

    path: Path
    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    method: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(
    directory: Path, step: int, module: nn.Module, optimizer: Optimizer, method: dict[str, Tensor], state: dict[str, Any],
    *, keep: int, is_writer: bool,
) -> None:  # fmt: skip
    """Write step `step` beside, flush, rename; then drop all but the newest `keep`. Every process must call it.

    Raises RunError when the disk refuses; the older checkpoints are then untouched.
    """
    weights, slots = gather_weights(module), _gather_optimizer(module, optimizer)
    if not is_writer:
        return
    final = directory / f"step-{step:06d}"
    temporary = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    try:
        directory.mkdir(exist_ok=True)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        temporary.mkdir()
        for name, tensors in zip(FILES, (weights, slots, method), strict=True):
            save_file({key: value.contiguous() for key, value in tensors.items()}, temporary / name)
            _flush(temporary / name)
        files = {name: {"bytes": (temporary / name).stat().st_size, "sha256": sha256(temporary / name)} for name in FILES}
        (temporary / RECORD).write_text(json.dumps({"step": step, "state": state, "files": files}, indent=2))
        _flush(temporary / RECORD)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one of the same step
        os.rename(temporary, final)
        _flush(directory)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"checkpoint of step {step} could not be written to {directory}: {e}; earlier ones are kept") from None
    for old in _by_age(directory)[keep:]:
        shutil.rmtree(old)


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is whole, and a line for each newer one that is not.

    Raises UserError when checkpoints are there and none of them is whole.
    """
    damaged = []
    for path in _by_age(directory):
        try:
            return _read(path), damaged
        except (OSError, ValueError, KeyError, SafetensorError) as e:
            damaged.append(f"checkpoint {path.name} is damaged ({e})")
    if damaged:
        raise UserError(f"run.dir: no usable checkpoint in {directory}: {'; '.join(damaged)}; remove {directory} to start over")
    return None, []


def _read(path: Path) -> Checkpoint:
    record = json.loads((path / RECORD).read_text())
    for name in FILES:
        expected, file = record["files"][name], path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}")
        if sha256(file) != expected["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
    weights, slots, method = (load_file(path / name) for name in FILES)
    return Checkpoint(path, record["step"], weights, slots, method, record["state"])


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: Optimizer) -> None:
    """Put weights and optimizer state back, exactly. Raises UserError when the names do not match the model's."""
    params = trainable(module)
    if missing := sorted(set(params) ^ set(checkpoint.weights)):
        raise UserError(f"run.dir: {checkpoint.path} does not fit this model: {missing[0]} (and {len(missing) - 1} more) differ")
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(_like(checkpoint.weights[name], p))
    names = {id(p): name for name, p in params.items()}
    for number, grouped in enumerate(optimizer.param_groups):
        for position, p in enumerate(grouped["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes: keep its paged buffers, fill them in place
                optimizer.init_state(grouped, p, number, position)  # type: ignore[attr-defined]
            slots = optimizer.state[p]
            prefix = names[id(p)] + "|"
            for key in (k for k in checkpoint.optimizer if k.startswith(prefix)):
                slot, value = key.removeprefix(prefix), checkpoint.optimizer[key]
                if isinstance(slots.get(slot), Tensor) and slots[slot].shape == value.shape:
                    slots[slot].copy_(value)
                elif isinstance(slots.get(slot), int):
                    slots[slot] = int(value)
                else:
                    slots[slot] = _like(value, p) if value.shape == p.shape else value


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def gather_weights(module: nn.Module) -> dict[str, Tensor]:
    """All trainable tensors, whole and on the CPU. Under FSDP every process must call it."""
    return {name: whole(p.detach()) for name, p in trainable(module).items()}


def _gather_optimizer(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    slots = {}
    for name, p in trainable(module).items():
        for slot, value in optimizer.state.get(p, {}).items():
            slots[f"{name}|{slot}"] = whole(value) if isinstance(value, Tensor) else torch.tensor(value)
    return slots


def _like(value: Tensor, p: Tensor) -> Tensor:
    if isinstance(p, DTensor):
        return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)
    return value.to(p.device)


def _by_age(directory: Path) -> list[Path]:
    """Newest first."""
    return sorted(directory.glob("step-*"), reverse=True)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
