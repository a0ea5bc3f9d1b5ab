"""A plain model directory as mlx-lm loads it: the same names, safetensors of format mlx, matrices in 4 or 8 bits if asked.

Quantized as MLX does it (`mx.quantize`, mode affine): rows in groups of 64, each with a scale and a bias, w = scale q + bias;
codes lie in uint32, the first in the lowest bits.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.errors import RunError, UserError
from posttrain.models.checkpoints.files import INDEX, Checkpoint
from posttrain.models.hub import FILES
from posttrain.runs.files import copy_own, write_json

GROUP = 64
BITS = {"q4": 4, "q8": 8}  # --dtype -> of a weight
FAMILIES = ("llama", "qwen2", "qwen3")  # of which every matrix is a linear layer's or an embedding's


def require_quantizable(config: Any) -> None:
    """Raises UserError for a model of transformers' config that is not quantized here. Loads nothing."""
    if config.model_type not in FAMILIES:
        raise UserError(
            f"export: no {config.model_type} model is quantized for MLX here (there are: {', '.join(FAMILIES)}); write --dtype "
            "bf16, and give that to mlx_lm.convert --quantize"
        )


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """[out, in] -> codes uint32 [out, in * bits / 32], and scales and biases [out, in / GROUP] in the weight's dtype."""
    most = 2**bits - 1
    groups = weight.float().unflatten(-1, (-1, GROUP))
    low, high = groups.amin(-1), groups.amax(-1)
    from_low = low.abs() > high.abs()  # the edge further from zero is met exactly
    scale = ((high - low) / most).clamp_min(1e-7) * torch.where(from_low, 1.0, -1.0)
    edge = torch.where(from_low, low, high)
    zero = (edge / scale).round()
    scale = torch.where(zero != 0, edge / torch.where(zero != 0, zero, 1.0), scale).to(weight.dtype)
    bias = torch.where(zero != 0, edge, 0.0).to(weight.dtype)
    codes = ((groups - bias.float()[..., None]) / scale.float()[..., None]).round().clamp(0, most).flatten(-2)
    places = torch.arange(0, 32, bits)
    words = (codes.long().unflatten(-1, (-1, 32 // bits)) << places).sum(-1)
    return words.to(torch.uint32), scale, bias


def dequantize(codes: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """What `quantize` stands for, float32."""
    bits = codes.shape[-1] * 32 // (scale.shape[-1] * GROUP)
    values = (codes.long()[..., None] >> torch.arange(0, 32, bits)) & (2**bits - 1)
    groups = values.flatten(-2).float().unflatten(-1, (-1, GROUP))
    return (groups * scale.float()[..., None] + bias.float()[..., None]).flatten(-2)


def write_mlx(directory: Path, out: Path, bits: int | None) -> list[str]:
    """directory: of plain safetensors. bits: None for weights as they are. Returns the matrices that stay as they are because
    their rows do not fill groups."""
    source, places, left = Checkpoint(directory), dict[str, str](), list[str]()
    for file, tensors in source.shards():
        made: dict[str, Tensor] = {}
        for name, tensor in tensors.items():
            if bits and tensor.dim() == 2 and not tensor.shape[-1] % GROUP:
                made |= dict(zip(_names(name), quantize(tensor, bits), strict=True))
                continue
            made[name] = tensor
            left += [name] if bits and tensor.dim() == 2 else []
        save_file(made, out / file.name, metadata={"format": "mlx"})
        written = load_file(out / file.name)
        if wrong := [name for name, tensor in made.items() if not torch.equal(written[name], tensor)]:
            raise RunError(f"{out / file.name} does not hold what was written at {wrong[0]}; is the disk sound?")
        places |= dict.fromkeys(made, file.name)
    _write_config(directory, out, places, bits)
    return left


def _write_config(directory: Path, out: Path, places: dict[str, str], bits: int | None) -> None:
    """All beside the weights, and an index of several files."""
    others = (
        file for pattern in FILES for file in directory.glob(pattern) if file.suffix != ".safetensors" and file.name != INDEX
    )
    copy_own(set(others), directory, out)
    if len(set(places.values())) > 1:
        size = sum(file.stat().st_size for file in out.glob("*.safetensors"))
        write_json(out / INDEX, {"metadata": {"total_size": size}, "weight_map": places})
    if bits:
        config = json.loads((out / "config.json").read_text(encoding="utf-8"))
        how = {"group_size": GROUP, "bits": bits, "mode": "affine"}
        write_json(out / "config.json", config | {"quantization": how, "quantization_config": how})


def read_mlx(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of what `write_mlx` has written, float32 where they are quantized."""
    for file in sorted(directory.glob("*.safetensors")):
        tensors = load_file(file)
        for name in [name for name in tensors if not name.endswith((".scales", ".biases"))]:
            parts = [tensors[each] for each in _names(name) if each in tensors]
            yield name, dequantize(*parts) if len(parts) == 3 else tensors[name]


def _names(name: str) -> tuple[str, str, str]:
    """Of a matrix' codes, scales and biases."""
    stem = name.removesuffix(".weight")
    return name, f"{stem}.scales", f"{stem}.biases"
