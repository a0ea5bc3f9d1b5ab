"""A LoRA of a diffusion model under the names by which ComfyUI looks for it.

UNets and their text encoders have the names of kohya's trainer, which others read too: `lora_unet_...`, `lora_te_...`, with an
`alpha` for every layer. Transformers (SD3, Flux) keep diffusers' names, which ComfyUI maps to its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import RunError, UserError
from posttrain.models.diffusion.families import FAMILIES, diffusers
from posttrain.models.peft.factors import Factors

Parts = dict[str, dict[str, Factors]]  # component of the pipeline -> layer -> its change
# what stands before a layer's name, by component, of pipelines with one text encoder and with two
_ONE, _TWO = {"unet": "lora_unet", "text_encoder": "lora_te"}, {"text_encoder": "lora_te1", "text_encoder_2": "lora_te2"}
# of SDXL's UNet, where diffusers' reader knows the original's names alone
_ORIGINAL = {"add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


def comfy_tensors(pipeline: str, parts: Parts, dtype: torch.dtype) -> dict[str, Tensor]:
    """The file's tensors. pipeline: the class's name, of FAMILIES. A layer's scale is in its factors, so alpha is the rank."""
    named = _by_kohya if FAMILIES[pipeline].denoiser == "unet" else _by_diffusers
    several = "text_encoder_2" in diffusers_components(pipeline)
    found: dict[str, Tensor] = {}
    for part, layers in parts.items():
        for layer, factors in layers.items():
            found |= {key: value.contiguous() for key, value in named(part, layer, factors, several).items()}
    return {key: value if key.endswith(".alpha") else value.to(dtype) for key, value in found.items()}


def diffusers_components(pipeline: str) -> list[str]:
    """Names of what a pipeline's class is made of."""
    return list(getattr(diffusers, pipeline)._get_signature_keys(getattr(diffusers, pipeline))[0])


def _by_kohya(part: str, layer: str, factors: Factors, several: bool) -> dict[str, Tensor]:
    before = (_ONE | (_TWO if several else {})).get(part)
    if before is None:
        raise UserError(f"run: ComfyUI has no name for a LoRA of {part}; posttrain merge writes a whole pipeline")
    stem = f"{before}_{_ORIGINAL.get(layer, _of_text(part, layer))}".replace(".", "_")
    alpha = torch.tensor(float(factors.rank))
    return {f"{stem}.lora_down.weight": factors.a, f"{stem}.lora_up.weight": factors.b, f"{stem}.alpha": alpha}


def _by_diffusers(part: str, layer: str, factors: Factors, several: bool) -> dict[str, Tensor]:
    stem = f"{part}.{_of_text(part, layer)}"
    return {f"{stem}.lora_A.weight": factors.a, f"{stem}.lora_B.weight": factors.b}


def _of_text(part: str, layer: str) -> str:
    """A CLIP's layers lie in its `text_model`, which transformers 5 leaves out of the names."""
    inner = part.startswith("text_encoder") and not layer.startswith(("text_model.", "text_projection"))
    return f"text_model.{layer}" if inner else layer


def write_comfy(pipeline: str, parts: Parts, file: Path, dtype: torch.dtype, metadata: dict[str, str]) -> None:
    """Write it, and have diffusers' own reader find every tensor again. Raises RunError where it does not."""
    tensors = comfy_tensors(pipeline, parts, dtype)
    save_file(tensors, file, metadata={"format": "pt", **metadata})
    written = load_file(file)
    if wrong := [name for name, tensor in tensors.items() if not torch.equal(written[name], tensor)]:
        raise RunError(f"{file} does not hold what was written at {wrong[0]}; is the disk sound?")
    read: Any = getattr(diffusers, pipeline).lora_state_dict
    try:
        found = read(str(file.parent), weight_name=file.name)
    except ValueError as error:
        raise RunError(f"{file.name}: diffusers' reader refuses it ({str(error).splitlines()[0]}); nothing was written") from None
    found = found[0] if isinstance(found, tuple) else found
    count = 2 * sum(map(len, parts.values()))
    if len(found) != count:
        raise RunError(f"{file.name}: diffusers' reader finds {len(found)} of its {count} matrices; nothing was written")
