"""How a frozen base is kept (`quant=`): a file a quantizer, found by listing this folder. See config/interfaces.py."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from posttrain.config.interfaces import QUANTIZERS, Quantizer

if TYPE_CHECKING:
    from torch import nn
    from transformers import BitsAndBytesConfig


def quantizer_of(settings: dict[str, Any]) -> Quantizer:
    """Of `quant=` as a plain dict, of a config or of a manifest, which may be an earlier version's: it is not checked again."""
    return QUANTIZERS.get(settings["method"]).model_construct(**settings)


def quantization(settings: dict[str, Any], device: str) -> BitsAndBytesConfig | None:
    """What `quant=`, as a plain dict, means for loading; None for none. Raises UserError where it cannot run on `device`."""
    return quantizer_of(settings).loading(device)


def blocks_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of a denoiser's blocks; what lies before and after them stays as it is."""
    from torch import nn

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear) and "block" in name}


def keep_as_quantized(model: nn.Module) -> None:
    """Keep bitsandbytes from repacking weights at the first evaluation on a CPU.

    Its AVX512 path rounds the absmax constants to bfloat16 in place, so a model that was once evaluated would train as
    another than one that was not. It also fails where a layer's inputs are no multiple of 64.
    """
    module: Any
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


NARROWEST = 32  # rows and columns of a layer in four bits


def wide_enough(shape: Collection[int]) -> bool:
    """Is a weight one that is kept in four bits: of experts [experts, ...], or of a linear layer [out, in] that is not narrow?

    bitsandbytes' kernel for a CPU cannot have fewer rows, and what is narrower takes no memory: coefficients, gates.
    """
    out, width = tuple(shape)[-2:]
    return len(shape) > 2 or min(out, width) >= NARROWEST
