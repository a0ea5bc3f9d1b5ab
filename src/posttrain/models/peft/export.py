"""A trained adapter as files that plain peft loads: always the whole change from the base that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.models.peft.attach import INIT, NEW, TASK, whole_number
from posttrain.models.peft.targets import suffixes
from posttrain.tensors import whole

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS = "adapter_model.safetensors"


class Factors(NamedTuple):
    """A layer's change as `scale` b a, with one scale for all layers."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


def export_adapter(model: PeftModel, out_dir: Path, base_path: str, is_writer: bool = True) -> None:
    """Write the whole change from the base that `base_path` names, in peft's format.

    LoRA in all its forms, where the change is a sum, becomes one plain LoRA in float32: a frozen and a new adapter of their
    summed rank (B A = [B_init B_new] [A_init; A_new], exact), AdaLoRA of the ranks that it has kept, PiSSA with what it took
    from the base. Other methods are written by peft itself. Every process must call it; one of them writes.
    """
    config: Any = model.peft_config[NEW]
    if config.peft_type in ("LORA", "ADALORA") and not getattr(config, "use_dora", False):
        scale, layers = sums(model)
        if is_writer:
            write_lora(layers, scale, out_dir, base_path, model.get_base_model(), config.fan_in_fan_out)
    elif is_writer:
        config.base_model_name_or_path = base_path
        model.save_pretrained(str(out_dir), selected_adapters=[NEW])


def write_lora(
    layers: dict[str, Factors], scale: float, out_dir: Path, base_path: str, base: nn.Module, fan_in_fan_out: bool
) -> None:
    """adapter_config.json and adapter_model.safetensors of a LoRA with these factors; ranks may differ. base: with or without
    weights, for its module names."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    layers = {name: factors for name, factors in layers.items() if len(factors.a)}
    ranks = {name: len(factors.a) for name, factors in layers.items()}
    r = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank != r}
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.lora_A.weight": factors.a.contiguous() for name, factors in layers.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": factors.b.contiguous() for name, factors in layers.items()}
    save_file(tensors, out_dir / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=r, lora_alpha=whole_number(scale * r), inference_mode=True, target_modules=suffixes(layers, base),
        rank_pattern={re.escape(name): rank for name, rank in lower.items()},
        alpha_pattern={re.escape(name): whole_number(scale * rank) for name, rank in lower.items()},
        base_model_name_or_path=base_path, fan_in_fan_out=fan_in_fan_out, task_type=TASK,
    ).save_pretrained(str(out_dir))  # fmt: skip
    written = load_file(out_dir / WEIGHTS)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{out_dir / WEIGHTS} does not hold what was written; is the disk sound?")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base model -> layer with adapters."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def stacked_rank(model: nn.Module) -> int:
    """The largest rank of what `export_adapter` would write of a LoRA."""
    return max(len(factors.a) for factors in sums(model)[1].values())  # type: ignore[arg-type]


def final_ranks(model: nn.Module) -> dict[str, int]:
    """How many singular values AdaLoRA has kept in each layer; empty for other methods."""
    layers = lora_layers(model)
    return {name: int((layer.lora_E[NEW] != 0).sum()) for name, layer in layers.items() if hasattr(layer, "lora_E")}


def remember_start(model: nn.Module) -> None:
    """Keep what PiSSA took from the base, before any training: the change is what the adapter has become beyond it."""
    for layer in lora_layers(model).values():
        if NEW in layer.lora_A:
            layer.taken = Factors(
                layer.lora_A[NEW].weight.detach().cpu().clone(), layer.lora_B[NEW].weight.detach().cpu().clone()
            )


def sums(model: PeftModel) -> tuple[float, dict[str, Factors]]:
    """A scale, and each layer's change over it, where changes are sums."""
    layers = lora_layers(model)
    adaptive = model.peft_config[NEW].peft_type == "ADALORA"
    scale = 1.0 if adaptive else next(layer.scaling[NEW] for layer in layers.values() if NEW in layer.scaling)
    return scale, {name: _kept(layer) if adaptive else _joined(layer, scale) for name, layer in layers.items()}


def _joined(layer: Any, scale: float) -> Factors:
    names = [name for name in (INIT, NEW) if name in layer.lora_A]
    a = [whole(layer.lora_A[name].weight).float() for name in names]
    b = [whole(layer.lora_B[name].weight).float() * (layer.scaling[name] / scale) for name in names]
    if hasattr(layer, "taken"):
        a.append(layer.taken.a.float())
        b.append(-layer.taken.b.float())
    return Factors(torch.cat(a), torch.cat(b, dim=1))


def _kept(layer: Any) -> Factors:
    """AdaLoRA's P Lambda Q without the singular values that it has dropped."""
    values = whole(layer.lora_E[NEW]).float()
    kept = values[:, 0] != 0
    scale = layer.scaling[NEW] / float(layer.ranknum[NEW] + 1e-5)  # as peft's forward has it
    a, b = whole(layer.lora_A[NEW]).float(), whole(layer.lora_B[NEW]).float()
    return Factors((a * values)[kept], b[:, kept] * scale)
