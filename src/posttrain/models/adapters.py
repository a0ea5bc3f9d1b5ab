"""LoRA adapters (Hu et al. 2021) on a frozen base: new ones, frozen ones from an earlier run, and one file for both."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from posttrain.errors import UserError
from posttrain.tensors import whole

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NEW, INIT = "default", "init"  # peft's names of the trained adapter and of the frozen one under it
WEIGHTS = "adapter_model.safetensors"


def add_adapter(model: PreTrainedModel, r: int, alpha: float, dropout: float, targets: str | list[str], dtype: str) -> PeftModel:
    """h = W0 x + (alpha/r) B A x with A random, B zero, and all of the base frozen.

    targets: all-linear, module names, or a regular expression over full names. dtype: of A and B.
    """
    from peft import LoraConfig, get_peft_model

    matched = _matched(model, targets)
    name, smallest = min(((n, min(_shape(m))) for n, m in matched.items()), key=lambda pair: pair[1])
    if r > smallest:
        raise UserError(f"peft.r: {r} is above the smaller side ({smallest}) of {name}; use at most {smallest}")
    config = LoraConfig(
        r=r, lora_alpha=_whole(alpha), lora_dropout=dropout, task_type="CAUSAL_LM",
        target_modules=_suffixes(matched, model), fan_in_fan_out=all(isinstance(m, Conv1D) for m in matched.values()),
    )  # fmt: skip
    peft = get_peft_model(model, config, adapter_name=NEW)
    for parameter in peft.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, dtype))
    return peft


def add_frozen(model: PeftModel, adapter_dir: Path) -> None:
    """Put a finished run's adapter, frozen, under the new one: h = W0 x + init(x) + new(x)."""
    before = torch.get_rng_state()
    model.load_adapter(str(adapter_dir), INIT, is_trainable=False)
    torch.set_rng_state(before)  # peft initialises at random what it then loads
    tuner: Any = model.base_model
    tuner.set_adapter([INIT, NEW])
    for name, parameter in model.named_parameters():
        if f".{INIT}." in name:
            parameter.requires_grad_(False)


@contextmanager
def starting_point(model: nn.Module) -> Iterator[None]:
    """Inside, the model is what the stage began with: the base and the frozen adapter, without the new one."""
    layers = list(_lora_layers(model).values())
    active = [layer._active_adapter for layer in layers]
    try:
        for layer in layers:
            layer._active_adapter = [name for name in layer.active_adapters if name != NEW]
        yield
    finally:
        for layer, names in zip(layers, active, strict=True):
            layer._active_adapter = names


def merge_into(model: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """W0 + (alpha/r) B A in place of W0: for full training that starts from an adapter."""
    from peft import PeftModel

    merged = PeftModel.from_pretrained(model, str(adapter_dir)).merge_and_unload()  # pyright: ignore
    return merged.requires_grad_(True)  # peft has frozen the base


def export_adapter(model: PeftModel, out_dir: Path, base_path: str, is_writer: bool = True) -> None:
    """Write the whole change from the base that `base_path` names, in peft's format and float32.

    Frozen and new adapter become one of their summed rank: B A = [B_init B_new] [A_init; A_new], exact. Every process must
    call it; one of them writes.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file, save_file

    layers = _lora_layers(model)
    config: Any = model.peft_config[NEW]
    scale = next(layer.scaling[NEW] for layer in layers.values() if NEW in layer.scaling)
    parts = {name: _joined(layer, scale) for name, layer in layers.items()}
    if not is_writer:
        return
    ranks = {name: part.a.shape[0] for name, part in parts.items()}
    r = max(ranks.values())
    lower = {name: rank for name, rank in ranks.items() if rank != r}
    out_dir.mkdir(parents=True, exist_ok=True)
    tensors = {f"base_model.model.{name}.lora_A.weight": part.a for name, part in parts.items()}
    tensors |= {f"base_model.model.{name}.lora_B.weight": part.b for name, part in parts.items()}
    save_file(tensors, out_dir / WEIGHTS, metadata={"format": "pt"})
    LoraConfig(
        r=r, lora_alpha=_whole(scale * r), inference_mode=True,
        target_modules=_suffixes(layers, model.get_base_model()),
        rank_pattern={re.escape(name): rank for name, rank in lower.items()},
        alpha_pattern={re.escape(name): _whole(scale * rank) for name, rank in lower.items()},
        base_model_name_or_path=base_path, fan_in_fan_out=config.fan_in_fan_out, task_type="CAUSAL_LM",
    ).save_pretrained(str(out_dir))  # fmt: skip
    written = load_file(out_dir / WEIGHTS)
    if any(not torch.equal(written[name], tensor) for name, tensor in tensors.items()):
        raise OSError(f"{out_dir / WEIGHTS} does not hold what was written; is the disk sound?")


class _Part(NamedTuple):
    a: Tensor  # [rank, in]
    b: Tensor  # [out, rank], such that `scale` b a is the change


def _joined(layer: Any, scale: float) -> _Part:
    names = [name for name in (INIT, NEW) if name in layer.lora_A]
    a = torch.cat([whole(layer.lora_A[name].weight).float() for name in names])
    b = torch.cat([whole(layer.lora_B[name].weight).float() * (layer.scaling[name] / scale) for name in names], dim=1)
    return _Part(a, b.contiguous())


def _whole(value: float) -> Any:  # peft's annotation says int, its arithmetic takes any number
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _lora_layers(model: nn.Module) -> dict[str, Any]:
    """Name in the base model -> layer with adapters."""
    from peft.tuners.lora import LoraLayer

    base = model.get_base_model() if hasattr(model, "get_base_model") else model  # pyright: ignore
    return {name: module for name, module in base.named_modules() if isinstance(module, LoraLayer)}


def _linears(model: nn.Module) -> dict[str, nn.Module]:
    """What an adapter can go on: the linear layers (of 4 bit too), but for the output head."""
    head = model.get_output_embeddings()  # pyright: ignore
    found = {n: m for n, m in model.named_modules() if isinstance(m, (nn.Linear, Conv1D)) and ".lora_" not in n}
    return {n.removesuffix(".base_layer"): m for n, m in found.items() if m is not head}


def _shape(linear: nn.Module) -> tuple[int, int]:
    if isinstance(linear, nn.Linear):
        return linear.in_features, linear.out_features
    return tuple(linear.weight.shape)  # pyright: ignore


def _matched(model: PreTrainedModel, targets: str | list[str]) -> dict[str, nn.Module]:
    linears = _linears(model)
    kinds = ", ".join(sorted({name.rpartition(".")[2] for name in linears}))
    if isinstance(targets, str):
        try:
            found = {n: m for n, m in linears.items() if targets == "all-linear" or re.fullmatch(targets, n)}
        except re.error as error:
            raise UserError(f"peft.targets: '{targets}' is no regular expression ({error})") from error
        missing = [] if found else [targets]
    else:
        found = {n: m for n, m in linears.items() if any(f".{n}".endswith(f".{t}") for t in targets)}
        missing = [t for t in targets if not any(f".{n}".endswith(f".{t}") for n in linears)]
    if missing or not found:
        raise UserError(f"peft.targets: no linear layer matches '{', '.join(missing)}'; this model has {kinds} (all-linear: all)")
    return found


def _suffixes(chosen: dict[str, Any], model: nn.Module) -> list[str]:
    """The shortest names that mean exactly `chosen`: last parts where those reach nothing else, else full names."""
    last = sorted({name.rpartition(".")[2] for name in chosen})
    reached = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in last}
    return last if reached == set(chosen) else sorted(chosen)
