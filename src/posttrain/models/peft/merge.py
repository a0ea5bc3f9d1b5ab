"""W0 + change in place of W0: a finished adapter written into its base's weights, file by file."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import RunError, UserError
from posttrain.models.checkpoints.files import Checkpoint, settle
from posttrain.models.hub import FILES, BaseInfo, resolve
from posttrain.models.peft.export import CONFIG, WEIGHTS
from posttrain.models.peft.factors import Factors
from posttrain.models.peft.kinds import require_kind
from posttrain.models.peft.names import by_parameter
from posttrain.runs.cache import cache_root


class Adapter:
    """An adapter's files, read. config: its adapter_config.json. tensors: by name, without peft's prefix. modules: names, in the
    base, of the layers that it changes.

    Raises UserError, about `field`, for files that are missing, damaged, of no known kind, or all zero.
    """

    def __init__(self, directory: Path, field: str) -> None:
        try:
            self.config: dict[str, Any] = json.loads((directory / CONFIG).read_text())
            tensors = load_file(directory / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{field}: {directory} holds no whole adapter ({error}); finish its run again") from None
        plain = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        self.tensors = by_parameter(self.config, plain)
        self.kind = require_kind(self.config, field)
        self.modules = self.kind.layers(self.tensors)
        if self.modules and self.kind.is_zero(self):
            raise UserError(f"{field}: the adapter in {directory} is all zero: its run has learned nothing")

    def require_mergeable(self, field: str, instead: str) -> None:
        """Raises UserError, about `field`, where it cannot be merged. instead: what to do then."""
        reason = self.kind.objection(self.config, self.tensors) or ("" if self.modules else "it changes no layer")
        if reason:
            raise UserError(f"{field}: its adapter cannot be merged ({reason}); {instead}")

    def factors(self, module: str) -> Factors:
        """The change of a layer as b a, in float32, where it is a sum."""
        return self.kind.factors(self, module)

    def applied(self, module: str, weight: Tensor) -> Tensor:
        """The layer's weight with the change in it, float32 [out, in] (or [in, out], where the base keeps it so)."""
        transposed = bool(self.config.get("fan_in_fan_out"))
        changed = self.kind.changed(self, module, (weight.T if transposed else weight).float())
        return changed.T.contiguous() if transposed else changed


def write_merged(
    base_dir: Path, adapter: Adapter, out: Path, dequantized: Callable[[str], Tensor | None] | None = None, form: str = "plain"
) -> None:
    """A model directory: every weight file is read, changed, written and read again.

    dequantized: the weight of a layer as a quantized base has it (None for one that is not quantized), in place of the one
    on disk. form: plain (in the base's own dtype; what its checkpoint keeps in fewer bits, dequantized), same (in the format of
    its checkpoint), or a dtype. Never more than a file's tensors are in memory. Raises RunError where a layer of the adapter is
    not in the files.
    """
    out.mkdir(parents=True)
    left, source = set(adapter.modules), Checkpoint(base_dir)
    for file, tensors in source.shards():
        for name, tensor in tensors.items():
            module = _module_of(name, adapter.modules)
            weight = dequantized(name.removesuffix(".weight")) if dequantized else None
            if module:
                left.discard(module)
                tensors[name] = adapter.applied(module, tensor if weight is None else weight).to(tensor.dtype).contiguous()
            elif weight is not None:
                tensors[name] = weight.to(tensor.dtype).contiguous()
        if form == "same":
            tensors = source.packed(tensors)
        elif form != "plain":
            tensors = {n: t.to(getattr(torch, form)) if t.is_floating_point() else t for n, t in tensors.items()}
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        written = load_file(out / file.name)
        if wrong := [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]:
            raise RunError(f"{out / file.name} does not hold what was written at {wrong[0]}; is the disk sound?")
    if left:
        raise RunError(f"the base's files have no weight for {sorted(left)[0]} (and {len(left) - 1} more layers of the adapter)")
    for pattern in FILES:
        for file in base_dir.glob(pattern):
            if file.suffix != ".safetensors" and file.name != "source.json":
                shutil.copy(file, out / file.name)
    settle(out, source.format is not None and form != "same", None if form in ("plain", "same") else form)


def _module_of(tensor: str, modules: list[str]) -> str | None:
    """The adapter's layer whose weight a tensor is; a bare checkpoint leaves the model's own prefix off its names."""
    name = tensor.removesuffix(".weight")
    if not tensor.endswith(".weight"):
        return None
    return next((module for module in modules if module == name or module.partition(".")[2] == name), None)


def merged_directory(base: BaseInfo, adapter_dir: Path, identity: str) -> Path:
    """A base with an adapter merged into it, kept in the cache: what a chained stage's new adapter belongs to.

    identity: names the adapter's content, as `base.digest` names the base's.
    """
    name = hashlib.sha256(f"{base.digest} {identity}".encode()).hexdigest()[:32]
    directory = cache_root() / "models" / f"merged-{name}"
    directory.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(str(directory) + ".lock"):
        if not directory.exists():
            with tempfile.TemporaryDirectory(dir=directory.parent) as scratch:
                made = Path(scratch) / "merged"
                adapter = Adapter(adapter_dir, "init")
                adapter.require_mergeable("init", "give a run whose adapter can be")
                write_merged(resolve(base.path, base.revision).directory, adapter, made)
                copy_tokenizer(adapter_dir, made)
                made.rename(directory)
    return directory


def copy_tokenizer(adapter_dir: Path, out: Path) -> None:
    """The run's tokenizer, with its chat template, in place of the base's."""
    for file in adapter_dir.iterdir():
        if not file.name.startswith("adapter_") and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(file, out / file.name)
