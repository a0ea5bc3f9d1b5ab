"""NF4 with double quantization, as bitsandbytes and transformers do it (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import BitsAndBytesConfig

from posttrain.errors import UserError


def quantization(quant: dict[str, Any], device: str) -> BitsAndBytesConfig | None:
    """What `quant=` (as a plain dict, of a config or a manifest) means for loading; None for none."""
    if quant["method"] == "nf4":
        return nf4(quant["double_quant"], quant["compute_dtype"], device)
    return int8(quant["threshold"]) if quant["method"] == "int8" else None


def nf4(double_quant: bool, compute_dtype: str, device: str) -> BitsAndBytesConfig:
    """Linear layers of the blocks in 4 bits; embeddings and head stay as they are. UserError where it cannot run."""
    try:
        with warnings.catch_warnings(action="ignore"):  # it names optional kernels that it does without
            from bitsandbytes import functional
    except ImportError as error:
        raise UserError(
            f"quant.method: nf4 needs bitsandbytes, which cannot be imported here ({error}); use quant=none"
        ) from error
    try:
        functional.quantize_4bit(torch.ones(64, 64, device=device), quant_type="nf4", compress_statistics=double_quant)
    except (RuntimeError, NotImplementedError, AssertionError, AttributeError) as error:
        line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"quant.method: bitsandbytes cannot do nf4 on {device} ({line}); use quant=none") from error
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )


def quantize_blocks(model: nn.Module, quant: dict[str, Any], device: str) -> None:
    """The linear layers of a denoiser's blocks in NF4, in place; what lies before and after them stays. UserError as for
    `nf4`."""
    config = nf4(quant["double_quant"], quant["compute_dtype"], device)
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for name, module in blocks_linears(model).items():
        kept = {"compress_statistics": config.bnb_4bit_use_double_quant, "quant_type": "nf4"}
        layer = Linear4bit(
            module.in_features, module.out_features, module.bias is not None, config.bnb_4bit_compute_dtype, device="meta", **kept
        )
        layer.weight = Params4bit(module.weight.detach(), requires_grad=False, **kept)
        layer.bias = module.bias
        parent, _, last = name.rpartition(".")
        setattr(model.get_submodule(parent), last, layer)
    model.to(device)  # which is when bitsandbytes does it
    model.is_loaded_in_4bit = True  # pyright: ignore (peft asks for it)
    keep_as_quantized(model)


def blocks_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a denoiser's blocks."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "block" in name}


def int8(threshold: float) -> BitsAndBytesConfig:
    """Linear layers of the blocks in 8 bits (Dettmers et al. 2022, arXiv 2208.07339); the rest as it is."""
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=threshold)


def keep_dense(layers: Iterable[nn.Module]) -> None:
    """Make what the NF4 weights of these layers stand for once, and keep it: `dense_weight` then need not make it."""
    from bitsandbytes.functional import dequantize_4bit

    for layer in layers:
        for weight in _in_four_bits(layer):
            weight.quant_state.dense = dequantize_4bit(weight, weight.quant_state)


def dense_bytes(layer: nn.Module) -> float:
    """What `keep_dense` takes for it."""
    states = [weight.quant_state for weight in _in_four_bits(layer)]
    return float(sum(state.shape.numel() * state.dtype.itemsize for state in states))


def _in_four_bits(layer: nn.Module) -> list[Any]:
    return [parameter for parameter in layer.parameters() if getattr(parameter, "quant_state", None) is not None]


def dense_weight(weight: Tensor, state: Any, dtype: torch.dtype) -> Tensor:
    """[out, in]: the weight itself, or with the `quant_state` of NF4 the one that it stands for; only `keep_dense` keeps that."""
    if state is None:
        return weight
    if (held := getattr(state, "dense", None)) is not None:
        return held.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state).to(dtype)


def keep_as_quantized(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights at the first evaluation on a CPU.

    Its AVX512 path rounds the absmax constants to bfloat16 in place, so a model that was once evaluated would train as
    another than one that was not. It also fails where a layer's inputs are no multiple of 64.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
