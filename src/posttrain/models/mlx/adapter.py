"""A LoRA as mlx-lm takes it beside its base (`--adapter-path`): adapters.safetensors and its own adapter_config.json."""

from __future__ import annotations

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.errors import UserError
from posttrain.models.peft.kinds import ROWS as OWN_ROWS
from posttrain.models.peft.kinds import is_plain_sum
from posttrain.models.peft.merge import Adapter
from posttrain.runs.files import write_json

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(.+)")


def write_mlx_adapter(adapter: Adapter, base: str, blocks: int, out: Path) -> None:
    """Every layer's whole change, filled up with zeros to one rank, for mlx-lm knows one. base: as mlx-lm is told it. blocks: how
    many layers the model has.

    Raises UserError for what mlx-lm has no place for.
    """
    instead = "--dtype bf16 writes a merged model"
    if not is_plain_sum(adapter.config) or adapter.config.get("target_parameters") or adapter.config.get(OWN_ROWS):
        raise UserError(f"run: mlx-lm takes a LoRA on linear layers, and this adapter is another, or brings more; {instead}")
    outside = [name for name in adapter.modules if not _LAYER.fullmatch(name)]
    if outside:
        raise UserError(f"run: mlx-lm has adapters on the model's layers alone, and this one is on {outside[0]} too; {instead}")
    factors = {name: adapter.factors(name) for name in adapter.modules}
    rank = max(each.rank for each in factors.values())
    tensors: dict[str, Tensor] = {}
    for name, (a, b, _) in factors.items():
        more = rank - len(a)
        tensors[f"{name}.lora_a"] = torch.cat([a, a.new_zeros(more, a.shape[1])]).T.contiguous()
        tensors[f"{name}.lora_b"] = torch.cat([b, b.new_zeros(len(b), more)], dim=1).T.contiguous()
    save_file(tensors, out / WEIGHTS, metadata={"format": "mlx"})
    keys = sorted({found[2] for name in factors if (found := _LAYER.fullmatch(name))})
    how = {"rank": rank, "scale": 1.0, "dropout": 0.0, "keys": keys}
    write_json(out / CONFIG, {"model": base, "fine_tune_type": "lora", "num_layers": blocks, "lora_parameters": how})
