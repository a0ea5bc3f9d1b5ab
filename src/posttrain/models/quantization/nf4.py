"""NF4 with double quantization, as bitsandbytes and transformers do it (Dettmers et al. 2023, arXiv 2305.14314)."""

from __future__ import annotations

import math
import warnings
from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.fields import NonNegative
from posttrain.config.interfaces import Quantizer
from posttrain.errors import UserError
from posttrain.models.quantization import blocks_linears, keep_as_quantized, wide_enough

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from transformers import BitsAndBytesConfig

BLOCK, BLOCK_OF_CONSTANTS = 64, 256  # parameters that share a constant, and constants that share one


class Nf4(Quantizer):
    """Four bits, as NormalFloat in blocks with scales."""

    is_readable = True
    for_images = True
    packs_experts = True
    comes_and_goes = True
    method: Literal["nf4"]
    double_quant: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    dense_layers: Literal["auto"] | NonNegative  # of which a copy in 16 bits is kept; auto: as many as memory has room for

    @property
    def kept_dense(self) -> int | Literal["auto"]:
        return self.dense_layers

    def loading(self, device: str) -> BitsAndBytesConfig:
        return nf4(self.double_quant, self.compute_dtype, device)

    def try_out(self, device: str) -> bool:
        nf4(True, "bfloat16", device)
        return True

    def quantize_blocks(self, model: nn.Module, device: str) -> None:
        quantize_blocks(model, self.double_quant, self.compute_dtype, device)

    def weight_bytes(self, shape: Collection[int]) -> tuple[float, float] | None:
        return nf4_bytes(math.prod(shape), self.double_quant) if wide_enough(shape) else None

    def made(self, layer: Any) -> bool:
        return type(layer).__name__ == "Linear4bit"

    def dequantized(self, layer: Any) -> Tensor:
        from peft.utils.integrations import dequantize_module_weight

        return dequantize_module_weight(layer)


QUANTIZER = Nf4


def nf4_bytes(parameters: float, double_quant: bool = True) -> tuple[float, float]:
    """(weights, constants) in bytes: half a byte a parameter; a float32 a block of 64, or 8 bit and a float32 a block of 256 of
    those: 0.127 bit a parameter."""
    blocks = -(-parameters // BLOCK)
    return parameters / 2, blocks + 4 * -(-blocks // BLOCK_OF_CONSTANTS) if double_quant else 4 * blocks


def nf4(double_quant: bool, compute_dtype: str, device: str) -> BitsAndBytesConfig:
    """Linear layers and experts of the blocks in 4 bits; embeddings and head stay as they are. UserError where it cannot run."""
    import torch
    from transformers import BitsAndBytesConfig

    from posttrain.models.quantization.experts import with_experts

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
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double_quant,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
    )
    return with_experts(config)


def quantize_blocks(model: nn.Module, double_quant: bool, compute_dtype: str, device: str) -> None:
    """The linear layers of a denoiser's blocks in NF4, in place; what lies before and after them stays. UserError as for
    `nf4`."""
    config = nf4(double_quant, compute_dtype, device)
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for name, module in blocks_linears(model).items():
        if not wide_enough((module.out_features, module.in_features)):
            continue
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
    """[out, in]: the weight itself, or what it stands for by the `quant_state` of NF4, or by what it is read through; only
    `keep_dense` keeps that."""
    if state is None:
        return weight
    if hasattr(state, "decode"):
        return state.decode(weight).to(dtype)
    if (held := getattr(state, "dense", None)) is not None:
        return held.to(dtype)
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(weight, state).to(dtype)
