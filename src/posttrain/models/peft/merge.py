"""W0 + change in place of W0: a finished adapter written into its base's weights, file by file."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import RunError, UserError
from posttrain.models.hub import FILES, BaseInfo, resolve
from posttrain.models.peft.export import WEIGHTS, Factors
from posttrain.runs.cache import cache_root

UNMERGEABLE = {"BOTTLENECK": "bottleneck adapters are not linear", "PREFIX_TUNING": "a prefix is no weight"}
UNMERGEABLE |= dict.fromkeys(("PROMPT_TUNING", "P_TUNING"), "a soft prompt is no weight")


class Adapter:
    """An adapter's files, read. config: its adapter_config.json. modules: names, in the base, of the layers that it changes.

    Raises UserError, about `field`, for files that are missing, damaged, or all zero.
    """

    def __init__(self, directory: Path, field: str) -> None:
        try:
            self.config: dict[str, Any] = json.loads((directory / "adapter_config.json").read_text())
            tensors = load_file(directory / WEIGHTS)
        except (OSError, ValueError, SafetensorError) as error:
            raise UserError(f"{field}: {directory} holds no whole adapter ({error}); finish its run again") from None
        self.tensors = {name.removeprefix("base_model.model."): value for name, value in tensors.items()}
        self.kind = "DORA" if self.config.get("use_dora") else str(self.config["peft_type"])
        ends = {"LORA": ".lora_B.weight", "DORA": ".lora_B.weight", "VERA": ".vera_lambda_b"}
        self.modules = sorted(n.removesuffix(end) for n in self.tensors if (end := ends.get(self.kind, "")) and n.endswith(end))
        halves = [self.tensors[module + ends[self.kind]] for module in self.modules]
        if self.modules and self.kind != "DORA" and not any(bool(half.any()) for half in halves):
            raise UserError(f"{field}: the adapter in {directory} is all zero: its run has learned nothing")

    def factors(self, module: str) -> Factors:
        """A LoRA's change of a layer as b a, in float32."""
        a, b = (self.tensors[f"{module}.lora_{half}.weight"].float() for half in "AB")
        return Factors(a, b * self._scaling(module, len(a)))

    def _scaling(self, module: str, rank: int) -> float:
        patterns = self.config.get("alpha_pattern") or {}
        alpha = next((value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)), None)
        alpha = self.config["lora_alpha"] if alpha is None else alpha
        return alpha / (rank**0.5 if self.config.get("use_rslora") else rank)

    def applied(self, module: str, weight: Tensor) -> Tensor:
        """The layer's weight with the change in it, float32 [out, in] (or [in, out], where the base keeps it so)."""
        transposed = bool(self.config.get("fan_in_fan_out"))
        changed = (weight.T if transposed else weight).float()
        if self.kind == "VERA":
            b, d = (self.tensors[f"{module}.vera_lambda_{which}"].float() for which in "bd")
            rows, columns = changed.shape
            a = d[:, None] * self.tensors["base_model.vera_A"].float()[: len(d), :columns]
            changed = changed + b[:, None] * (self.tensors["base_model.vera_B"].float()[:rows, : len(d)] @ a)
        else:
            factors = self.factors(module)
            changed = changed + factors.b @ factors.a
        if self.kind == "DORA":  # Liu et al. 2024, arXiv 2402.09353, eq. 5: the magnitude of every row is learned
            magnitude = self.tensors[f"{module}.lora_magnitude_vector"].float().reshape(-1, 1)
            changed = magnitude * changed / torch.linalg.vector_norm(changed, dim=1, keepdim=True)
        return changed.T.contiguous() if transposed else changed


def write_merged(base_dir: Path, adapter: Adapter, out: Path, dequantized: Callable[[str], Tensor | None] | None = None) -> None:
    """A plain model directory in the base's own dtype: every weight file is read, changed, written and read again.

    dequantized: the weight of a layer as a quantized base has it (None for one that is not quantized), in place of the one
    on disk. Never more than a file's tensors are in memory. Raises RunError where a layer of the adapter is not in the files.
    """
    out.mkdir(parents=True)
    left = set(adapter.modules)
    for file in sorted(base_dir.glob("*.safetensors")):
        with safe_open(file, framework="pt") as shard:
            metadata = shard.metadata() or {"format": "pt"}
            tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118 (safe_open is no dict)
        for name, tensor in tensors.items():
            module = _module_of(name, adapter.modules)
            weight = dequantized(name.removesuffix(".weight")) if dequantized else None
            if module:
                left.discard(module)
                tensors[name] = adapter.applied(module, tensor if weight is None else weight).to(tensor.dtype).contiguous()
            elif weight is not None:
                tensors[name] = weight.to(tensor.dtype).contiguous()
        save_file(tensors, out / file.name, metadata=metadata)
        written = load_file(out / file.name)
        if wrong := [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]:
            raise RunError(f"{out / file.name} does not hold what was written at {wrong[0]}; is the disk sound?")
    if left:
        raise RunError(f"the base's files have no weight for {sorted(left)[0]} (and {len(left) - 1} more layers of the adapter)")
    for pattern in FILES:
        for file in base_dir.glob(pattern):
            if file.suffix != ".safetensors" and file.name != "source.json":
                shutil.copy(file, out / file.name)


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
                write_merged(resolve(base.path, base.revision).directory, Adapter(adapter_dir, "init"), made)
                copy_tokenizer(adapter_dir, made)
                made.rename(directory)
    return directory


def copy_tokenizer(adapter_dir: Path, out: Path) -> None:
    """The run's tokenizer, with its chat template, in place of the base's."""
    for file in adapter_dir.iterdir():
        if not file.name.startswith("adapter_") and file.suffix in (".json", ".jinja", ".model", ".txt"):
            shutil.copy(file, out / file.name)
