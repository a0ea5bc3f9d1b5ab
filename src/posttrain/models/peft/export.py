"""A trained adapter as files that plain peft loads: always the whole change from the base that they name."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.config.interfaces import Method
from posttrain.models.peft.attach import NEW, TASK
from posttrain.models.peft.factors import Factors
from posttrain.models.peft.names import file_targets, key_of, parameter_names, renamed
from posttrain.models.peft.places import PREFIX, places_written

if TYPE_CHECKING:
    from peft import PeftModel

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


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
    model.save_pretrained(str(out_dir), selected_adapters=[NEW], save_embedding_layers=False)
    _sort_targets(out_dir)


def write_lora(
    layers: dict[str, Factors], scale: float, out_dir: Path, base_path: str, base: nn.Module, fan_in_fan_out: bool
) -> None:
    """adapter_config.json and adapter_model.safetensors of a LoRA with these factors; ranks may differ. layers: by module, or by
    parameter where that is no `weight`. base: with or without weights, for its names."""
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    layers = {name: factors for name, factors in layers.items() if factors.rank}
    linear, parameters, patterns = _sorted_out(layers, base)
    r = max(factors.rank for factors in layers.values())
    lower = {patterns[name]: factors.rank for name, factors in layers.items() if factors.rank != r}
    out_dir.mkdir(parents=True, exist_ok=True)
    every, tensors = parameter_names(base), {}
    places = {n: key_of(parameters[n], parameters.values(), every) if n in parameters else n for n in layers}
    written = places_written(base, places.values())
    for name, factors in layers.items():
        key = f"{PREFIX}{written[places[name]]}"
        tensors |= {f"{key}.lora_A.weight": factors.a.contiguous(), f"{key}.lora_B.weight": factors.b.contiguous()}
    save_file(tensors, out_dir / WEIGHTS, metadata={"format": "pt"})
    targets: dict[str, Any] = file_targets(base, linear, parameters.values())
    LoraConfig(
        r=r, lora_alpha=whole_number(scale * r), inference_mode=True,
        rank_pattern={re.escape(name): rank for name, rank in lower.items()},
        alpha_pattern={re.escape(name): whole_number(scale * rank) for name, rank in lower.items()},
        base_model_name_or_path=base_path, fan_in_fan_out=fan_in_fan_out, task_type=TASK,
        **targets,
    ).save_pretrained(str(out_dir))  # fmt: skip
    _sort_targets(out_dir)
    written = load_file(out_dir / WEIGHTS)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{out_dir / WEIGHTS} does not hold what was written; is the disk sound?")


def _sorted_out(layers: dict[str, Factors], base: nn.Module) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """The linear layers; the full names of the other parameters; and by what name peft looks for a rank of each."""
    modules = dict(base.named_modules())
    linear = [name for name in layers if hasattr(modules.get(name), "in_features") or isinstance(modules.get(name), Conv1D)]
    linear = [name for name in linear if not hasattr(modules[name], "parameter_name")]
    parameters = {name: f"{name}.weight" if name in modules else name for name in layers if name not in linear}
    odd = renamed(base, linear)
    patterns = {name: f"{name}.weight" if name in odd else parameters.get(name, name) for name in layers}
    return linear, parameters, patterns


def _sort_targets(out_dir: Path) -> None:
    """peft writes its sets of names in an order that changes from process to process; equal runs are to have equal files."""
    file = out_dir / CONFIG
    config = json.loads(file.read_text(encoding="utf-8"))
    config |= {key: sorted(config[key]) for key in ("target_modules", "exclude_modules") if isinstance(config.get(key), list)}
    file.write_text(json.dumps(config, indent=2, sort_keys=True), encoding="utf-8")


def lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base model -> layer with adapters; a parameter's name where that is no `weight`."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    found: dict[str, Any] = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraLayer):
            own: str = getattr(module, "parameter_name", "weight")
            plain = name.replace(".base_layer", "")
            found[plain if own == "weight" else f"{plain}.{own}"] = module
    return found


def stacked_rank(model: nn.Module) -> int:
    """The largest rank of what `export_adapter` would write of a LoRA."""
    found = method_on(model).sums(model)
    assert found
    return max(factors.rank for factors in found[1].values())


def whole_number(value: float) -> Any:
    """peft's annotations say int, its arithmetic takes any number."""
    return round(value) if abs(value - round(value)) < 1e-9 else value
