"""A trained adapter as files that plain peft loads: always the whole change from the base that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.config.interfaces import Method
from posttrain.models.peft.attach import NEW, TASK
from posttrain.models.peft.targets import suffixes

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class Factors(NamedTuple):
    """A layer's change as `scale` b a, with one scale for all layers."""

    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank]


def method_on(model: Any) -> Method:
    """The method that has put its adapter on a model to train it."""
    return model.peft_method


def export_adapter(model: PeftModel, out_dir: Path, base_path: str, is_writer: bool = True) -> None:
    """Write the whole change from the base that `base_path` names, in peft's format, as its method does.

    Where the change is a sum, it becomes one plain LoRA. Every process must call it; one of them writes.
    """
    method_on(model).export(model, out_dir, base_path, is_writer)


def write_as_peft(model: PeftModel, out_dir: Path, base_path: str) -> None:
    """The newest adapter as peft writes it, beside the base that `base_path` names."""
    model.peft_config[NEW].base_model_name_or_path = base_path
    model.save_pretrained(str(out_dir), selected_adapters=[NEW])
    _sort_targets(out_dir)


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
    _sort_targets(out_dir)
    written = load_file(out_dir / WEIGHTS)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{out_dir / WEIGHTS} does not hold what was written; is the disk sound?")


def _sort_targets(out_dir: Path) -> None:
    """peft writes its sets of names in an order that changes from process to process; equal runs are to have equal files."""
    file = out_dir / CONFIG
    config = json.loads(file.read_text())
    config |= {key: sorted(config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), list)}
    file.write_text(json.dumps(config, indent=2, sort_keys=True))


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base model -> layer with adapters."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def stacked_rank(model: nn.Module) -> int:
    """The largest rank of what `export_adapter` would write of a LoRA."""
    found = method_on(model).sums(model)
    assert found
    return max(len(factors.a) for factors in found[1].values())


def whole_number(value: float) -> Any:
    """peft's annotations say int, its arithmetic takes any number."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
