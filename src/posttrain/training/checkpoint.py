"""Checkpoints: complete or absent, verified when read, and without a pickle.

checkpoints/step-000040/ holds weights.safetensors (what is trained), optimizer.safetensors, method.safetensors (what AdaLoRA
remembers; empty for others), and checkpoint.json with the step, the run's counters, size and sha256 of the files, and a sha256 of
itself. There is no random state in it: every step is seeded from the run's seed and its number.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from posttrain.errors import RunError, UserError, of_all
from posttrain.runs.earlier import current_parameter
from posttrain.runs.files import by_umask, flush, free_bytes, sha256
from posttrain.tensors import all_whole
from posttrain.training.optimizer import Kept, optimizer_used, plain_optimizer, state_bytes
from posttrain.training.processes import Processes

RECORD = "checkpoint.json"
FILES: tuple[str, ...] = ("weights.safetensors", "optimizer.safetensors", "method.safetensors")
_DAMAGE = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
ALONE = Processes()
GROUP = "group."  # before what an optimizer keeps of a group, beside the state of its first parameter
_NAME = re.compile(r"step-(\d{6,})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk. state: the counters of the run."""

    path: Path
    step: int
    state: dict[str, Any]

    @property
    def weights(self) -> dict[str, Tensor]:
        """What was trained, by the names of parameters."""
        return load_file(self.path / FILES[0])

    @property
    def optimizer(self) -> dict[str, Tensor]:
        """The state of the optimizer."""
        return load_file(self.path / FILES[1])

    @property
    def moments(self) -> Kept | None:
        """Whose moments it has; None where it has none."""
        with safe_open(self.path / FILES[1], framework="pt") as file:
            slots = {key.rpartition("|")[2] for key in file.keys()}  # noqa: SIM118
        return "bitsandbytes" if "state1" in slots else "adamw" if "exp_avg" in slots else None

    @property
    def method(self) -> dict[str, Tensor]:
        """What the step callback keeps; empty for most methods."""
        return load_file(self.path / FILES[2])


def save_checkpoint(
    directory: Path, step: int, module: nn.Module, optimizer: Optimizer, method: dict[str, Tensor], state: dict[str, Any],
    *, keep: int, processes: Processes = ALONE, spare: Collection[int | None] = (),
) -> None:  # fmt: skip
    """Write the checkpoint of `step` under another name, flush it, read it back and rename it. Then delete older ones, except the
    newest `keep` and those of steps in `spare`. module: as `restore` will be given it. Every process must call it; rank 0 writes.

    Raises RunError for values that are not finite, and when the disk refuses. The older checkpoints are then untouched.
    """
    weights = all_whole(trainable(module), processes.main)
    slots = _slots(module, plain_optimizer(optimizer))
    parts = dict(zip(FILES, (weights, all_whole(slots, processes.main), method), strict=True))
    processes.told(lambda: _save(directory, step, parts, state, keep, spare))


def _save(
    directory: Path,
    step: int,
    parts: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    keep: int,
    spare: Collection[int | None],
) -> None:
    final = directory / f"step-{step:06d}"
    if _is_whole(final):  # the very same, from before a stop that came before the next step
        return
    temporary = directory / f".step-{step:06d}.{os.getpid()}.tmp"
    if broken := next((name for part in parts.values() for name, value in part.items() if not _is_finite(value)), None):
        raise RunError(f"after step {step} {broken} is not finite; it is not saved, earlier checkpoints are kept")
    try:
        directory.mkdir(exist_ok=True)
        for leftover in directory.glob(".step-*.tmp"):
            shutil.rmtree(leftover)
        _check_space(directory, sum(value.nbytes for part in parts.values() for value in part.values()))
        temporary.mkdir()
        _write(temporary, step, parts, state)
        by_umask(temporary)
        shutil.rmtree(final, ignore_errors=True)  # only ever a damaged one of the same step
        os.rename(temporary, final)
        flush(directory)
    except (OSError, SafetensorError) as e:
        shutil.rmtree(temporary, ignore_errors=True)
        raise RunError(f"checkpoint of step {step} could not be written to {directory}: {e}; earlier ones are kept") from None
    delete_older(directory, step, keep, spare)


def delete_older(directory: Path, step: int, keep: int, spare: Collection[int | None]) -> None:
    """Delete the checkpoints up to `step`, except the newest `keep` of them and those of steps in `spare`."""
    # what is newer was damaged, or this run would have gone on from it
    for old in [path for path in _newest_first(directory) if _step_of(path) <= step and _step_of(path) not in spare][keep:]:
        shutil.rmtree(old, ignore_errors=True)


def _write(directory: Path, step: int, parts: dict[str, dict[str, Tensor]], state: dict[str, Any]) -> None:
    """All files of a checkpoint, each flushed and compared with what it was to hold. Raises OSError."""
    for name, tensors in parts.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, directory / name)
        flush(directory / name)
        with safe_open(directory / name, framework="pt") as found:
            if any(not torch.equal(found.get_tensor(key), value) for key, value in tensors.items()):
                raise OSError(f"{name} does not hold what was written; is the disk sound?")
    files = {name: {"bytes": (directory / name).stat().st_size, "sha256": sha256(directory / name)} for name in parts}
    text = json.dumps({"files": files, "state": state, "step": step}, indent=2, sort_keys=True)
    record = json.dumps({"sha256": _sha256_of(text), **json.loads(text)}, indent=2)
    (directory / RECORD).write_text(record, encoding="utf-8")
    flush(directory / RECORD)
    flush(directory)


def check_room(directory: Path, module: nn.Module, optimizer: str) -> None:
    """Raises UserError unless two checkpoints of this module fit: the last good one stays while the next is written."""
    params = trainable(module).values()
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    used, _ = optimizer_used(optimizer, sum(p.numel() for p in params), kind, False)
    size = sum(p.nbytes for p in params) + state_bytes(used, module)
    free = free_bytes(directory.parent)
    if free < 2 * size:
        raise UserError(
            f"run.dir: two checkpoints of {size / 2**20:.0f} MiB do not fit in the {free / 2**20:.0f} MiB that are free under "
            f"{directory.parent}; free some or give another run.dir"
        )


def _check_space(directory: Path, needed: int) -> None:
    free = free_bytes(directory)
    if free < needed:
        raise OSError(f"it needs {needed / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free")


def newest_checkpoint(directory: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest checkpoint that is intact, and a line for each newer one that is not. No tensor is read yet.

    Raises UserError when checkpoints are there and none of them is whole.
    """
    damaged = []
    for path in _newest_first(directory):
        try:
            return _verified(path), damaged
        except _DAMAGE as e:
            damaged.append(f"checkpoint {path.name} is damaged ({e})")
    if damaged:
        raise UserError(f"run.dir: no usable checkpoint in {directory}: {'; '.join(damaged)}; remove {directory} to start over")
    return None, []


def checkpoint_of(directory: Path, step: int) -> Checkpoint:
    """The one of this step. Raises UserError where it is damaged or gone."""
    path = directory / f"step-{step:06d}"
    try:
        return _verified(path)
    except _DAMAGE as e:
        raise UserError(
            f"run.dir: checkpoint {path}, whose weights are the best so far, is damaged ({e}); put it back, or take the last "
            "weights: train.keep_best=null resume.allow=train.keep_best"
        ) from None


def _is_whole(path: Path) -> bool:
    try:
        return bool(_verified(path))
    except _DAMAGE:
        return False


def _verified(path: Path) -> Checkpoint:
    record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    if record.pop("sha256", None) != _sha256_of(json.dumps(record, indent=2, sort_keys=True)):
        raise ValueError(f"{RECORD} does not match its sha256")
    if path.name != f"step-{record['step']:06d}":
        raise ValueError(f"{RECORD} is of step {record['step']}")
    for name in FILES:
        expected, file = record["files"][name], path / name
        if not file.exists():
            raise ValueError(f"{name} is missing")
        if file.stat().st_size != expected["bytes"]:
            raise ValueError(f"{name} has {file.stat().st_size} bytes, not {expected['bytes']}")
        if sha256(file) != expected["sha256"]:
            raise ValueError(f"{name} does not match its sha256")
    return Checkpoint(path, record["step"], record["state"])


def restore(checkpoint: Checkpoint, module: nn.Module, optimizer: Optimizer, processes: Processes = ALONE) -> None:
    """Put weights and optimizer state back, exactly. Rank 0 reads them, a tensor at a time, and tells the others; every process
    must call it. Raises UserError when they do not fit the model's."""
    params = trainable(module)
    weights, kept = (_Tensors(checkpoint.path / name if processes.main else None) for name in FILES[:2])
    known, slots = processes.told(lambda: (weights.shapes(), kept.shapes()))
    wrong = sorted(set(params) ^ set(known)) or [n for n, p in params.items() if known[n][0] != p.shape]
    wrong = wrong or sorted({key.rpartition("|")[0] for key in slots} - set(params))
    if wrong:
        raise of_all(
            UserError(f"run.dir: {checkpoint.path} does not fit this model: {wrong[0]} (and {len(wrong) - 1} more) differ")
        )
    with torch.no_grad():
        for name, p in params.items():
            p.copy_(_like(weights.get(name), *known[name], p, processes))
    names = {id(p): name for name, p in params.items()}
    for number, grouped in enumerate(optimizer.param_groups):
        for position, p in enumerate(grouped["params"]):
            if hasattr(optimizer, "init_state"):  # bitsandbytes: keep its paged buffers, fill them in place
                optimizer.init_state(grouped, p, number, position)  # type: ignore[attr-defined]
            else:
                optimizer.state.pop(p, None)  # of the steps after the checkpoint, which may have been before the first
            prefix = names[id(p)] + "|"
            for key in (key for key in slots if key.startswith(prefix)):
                value, slot = _like(kept.get(key), *slots[key], p, processes), key.removeprefix(prefix)
                if slot.startswith(GROUP):
                    grouped[slot.removeprefix(GROUP)] = _number(value)
                    continue
                on_host = _is_on_host(optimizer.state[p], slot, grouped)
                _fill(optimizer.state[p], slot, value.cpu() if on_host else value.to(p.device))


def _is_on_host(slots: dict[str, Any], slot: str, group: dict[str, Any]) -> bool:
    """Does the optimizer keep this on the CPU? A number, and AdamW's counter unless it is fused, as in torch's own
    `load_state_dict`."""
    return isinstance(slots.get(slot), int) or (slot == "step" and not (group.get("fused") or group.get("capturable")))


def _fill(slots: dict[str, Any], slot: str, value: Tensor) -> None:
    """Put a value back into an optimizer's state."""
    if isinstance(slots.get(slot), Tensor) and slots[slot].shape == value.shape:
        slots[slot].copy_(value)
    elif not value.ndim and value.dtype in (torch.int64, torch.float64):  # as `_tensor` has made it of a number
        slots[slot] = _number(value)
    else:
        slots[slot] = value


def _tensor(value: Any) -> Tensor:
    """A number of Python's, whole; a tensor as it is."""
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else torch.int64)


def _number(value: Tensor) -> float | int:
    return value.item()


class _Tensors:
    """A checkpoint's file, of which a tensor at a time is read; None: another process reads it."""

    def __init__(self, path: Path | None) -> None:
        self.file: Any = path and safe_open(path, framework="pt")
        self.stored = {current_parameter(name): name for name in self.file.keys()} if self.file else {}  # noqa: SIM118

    def shapes(self) -> dict[str, tuple[torch.Size, torch.dtype]]:
        """Of each tensor, by its name of today."""
        found = {name: self.file.get_tensor(stored) for name, stored in self.stored.items()}  # a view of the file
        return {name: (value.shape, value.dtype) for name, value in found.items()}

    def get(self, name: str) -> Tensor | None:
        return self.file.get_tensor(self.stored[name]) if self.file else None


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that are trained, by name."""
    return {name: p for name, p in module.named_parameters() if p.requires_grad}


def _slots(module: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, by parameter and slot."""
    found = {}
    names = {id(p): name for name, p in trainable(module).items()}
    for name, p in trainable(module).items():
        for slot, value in optimizer.state.get(p, {}).items():
            found[f"{name}|{slot}"] = _tensor(value)
    for group in optimizer.param_groups:
        kept = group.get("keeps", ())  # with the group's first parameter, which names it
        found |= {f"{names[id(group['params'][0])]}|{GROUP}{key}": _tensor(group[key]) for key in kept if key in group}
    return found


def _like(value: Tensor | None, shape: torch.Size, dtype: torch.dtype, p: Tensor, processes: Processes) -> Tensor:
    """What rank 0 has read, on the CPU or this process's device; sharded as `p` is where it is of p's shape."""
    if isinstance(p, DTensor) and shape == p.shape:
        held = torch.empty(shape, dtype=dtype, device=p.device) if value is None else value.to(p.device)
        return distribute_tensor(held, p.device_mesh, p.placements)
    return processes.spread(value, shape, dtype)


def _is_finite(value: Tensor) -> bool:
    return not value.is_floating_point() or bool(value.isfinite().all())


def steps_in(directory: Path) -> list[int]:
    """Of the checkpoints there, in order."""
    return [_step_of(path) for path in reversed(_newest_first(directory))]


def _newest_first(directory: Path) -> list[Path]:
    return sorted((p for p in directory.glob("step-*") if _NAME.fullmatch(p.name)), key=_step_of, reverse=True)


def _step_of(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _sha256_of(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
