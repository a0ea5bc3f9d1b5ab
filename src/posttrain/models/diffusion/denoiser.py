"""What of a pipeline is trained, and the files that training leaves: a LoRA as diffusers loads it, or a whole pipeline."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from posttrain.config.interfaces import Method
from posttrain.errors import UserError
from posttrain.models.diffusion.families import FAMILIES, bare, text_encoders
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.export import write_as_peft
from posttrain.models.peft.factors import Factors
from posttrain.runs.files import stays_inside

LORA_FILE = "pytorch_lora_weights.safetensors"  # the name that load_lora_weights looks for
ATTENTION = r".*\.(to_[qkv]|to_out\.0|add_[qkv]_proj|to_add_out|[qkv]_proj|out_proj)"


def trained_parts(pipe: Any, method: Method, text_encoder: bool, num_steps: int, recompute: bool) -> dict[str, nn.Module]:
    """Component name -> what of it is trained, with its method on it. recompute: activations in the backward pass.

    Raises UserError for targets that match nothing and ranks that do not fit.
    """
    family = FAMILIES[type(pipe).__name__]
    chosen: dict[str, Any] = {family.denoiser: getattr(pipe, family.denoiser)}
    if text_encoder:
        chosen |= {n: m for n, m in text_encoders(pipe).items() if isinstance(m, CLIPTextModel | CLIPTextModelWithProjection)}
    method = method.with_targets({"attention": ATTENTION})
    found = {}
    for name, module in chosen.items():
        if recompute:
            (module.gradient_checkpointing_enable if name.startswith("text") else module.enable_gradient_checkpointing)()
        found[name] = add_method(module, method, num_steps, task=None)
    return found


def save_adapter(parts: dict[str, Any], out: Path, method: Method, base: str) -> None:
    """The adapter of every part, as plain diffusers loads it: one file of LoRA factors whose scale is in them, each change B A.

    Layers of lower rank are filled up with zeros, for loaders take one rank for all. What diffusers cannot load is left in
    peft's own format, in a folder a part.
    """
    tensors: dict[str, Tensor] = {}
    out.mkdir(parents=True)
    for name, module in parts.items():
        if found := method.sums(module):
            scale, layers = found
            tensors |= lora_tensors(name, {layer: factors.times(scale) for layer, factors in layers.items()})
        elif others := method.image_tensors(module):
            tensors |= {f"{name}.{key}": tensor for key, tensor in others.items()}
        else:
            write_as_peft(module, out / name, base)
    if tensors:
        write_tensors(tensors, out)


def lora_tensors(part: str, layers: dict[str, Factors]) -> dict[str, Tensor]:
    """The factors of a part as diffusers names them, filled up with zeros to one rank."""
    rank = max(len(factors.a) for factors in layers.values())
    found = {}
    for layer, (a, b, _) in layers.items():
        more = rank - len(a)
        found[f"{part}.{layer}.lora_A.weight"] = torch.cat([a, a.new_zeros(more, a.shape[1])]).contiguous()
        found[f"{part}.{layer}.lora_B.weight"] = torch.cat([b, b.new_zeros(len(b), more)], dim=1).contiguous()
    return found


def write_tensors(tensors: dict[str, Tensor], out: Path) -> None:
    """Write, read again and compare. Raises OSError where the file does not hold what was written."""
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / LORA_FILE, metadata={"format": "pt"})
    written = load_file(out / LORA_FILE)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{out / LORA_FILE} does not hold what was written; is the disk sound?")


def read_factors(adapter: Path, field: str) -> dict[str, dict[str, Factors]]:
    """Part -> layer -> the change that a saved LoRA makes. Raises UserError, about `field`, for what is no sum."""
    if not (adapter / LORA_FILE).is_file():
        raise UserError(f"{field}: the change in {adapter} is no sum of matrices that others could be added to; merge it")
    tensors = load_file(adapter / LORA_FILE)
    if any("lora_magnitude_vector" in name for name in tensors):
        raise UserError(f"{field}: the change of dora in {adapter} is no sum of matrices; merge it")
    found: dict[str, dict[str, Factors]] = {}
    for name in (n for n in tensors if n.endswith(".lora_B.weight")):
        part, _, layer = name.removesuffix(".lora_B.weight").partition(".")
        a = tensors[name.replace(".lora_B.", ".lora_A.")].float()
        found.setdefault(part, {})[layer] = Factors(a, tensors[name].float())
    return found


def load_adapter(pipe: Any, adapter: Path, name: str) -> None:
    """Put a saved adapter on a pipeline, under a name by which `pipe.set_adapters` finds it."""
    if (adapter / LORA_FILE).is_file():
        with warnings.catch_warnings(action="ignore"):  # of others that are there already
            pipe.load_lora_weights(adapter, weight_name=LORA_FILE, adapter_name=name)
        return
    from peft import PeftModel

    for folder in sorted(path for path in adapter.iterdir() if path.is_dir()):
        PeftModel.from_pretrained(getattr(pipe, folder.name), str(folder), adapter_name=name)  # in place, layer by layer


def save_pipeline(base_dir: Path, parts: dict[str, Any], out: Path) -> None:
    """Write the base's files, with `parts` in place of the base's parts of the same names. Links out of the base are left out."""

    def left_out(folder: str, names: list[str]) -> list[str]:
        foreign = [name for name in names if not stays_inside(Path(folder) / name, base_dir)]
        return [*foreign, *(name for name in names if name in parts or name == "source.json")]

    shutil.copytree(base_dir, out, ignore=left_out, copy_function=shutil.copyfile)
    for name, module in parts.items():
        bare(module).save_pretrained(out / name)
