"""bitsandbytes' layers without their codes in the graph, which they keep there where no hook of autograd sees it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.quantization.nf4 import dense_weight


def keep_no_codes(module: nn.Module) -> None:
    """Give every layer within that is in 4 bits a forward with the same bits, and a backward that asks for its codes anew."""
    try:
        from bitsandbytes.nn.modules import Linear4bit
    except ImportError:  # then there are none
        return
    for layer in module.modules():
        if isinstance(layer, Linear4bit):
            layer.forward = _by_products(layer)


class _Product(torch.autograd.Function):
    """The layer's own product with x, and the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, layer: Any) -> Tensor:
        # what is saved is asked for at first in the backward, and so brings on the layer's recomputation
        ctx.save_for_backward(weight)
        ctx.state, ctx.dtype, ctx.of_x = weight.quant_state, layer.compute_dtype or x.dtype, x.dtype  # pyright: ignore
        return type(layer).forward(layer, x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (weight,) = ctx.saved_tensors
        return (gradients[0].to(ctx.dtype) @ dense_weight(weight, ctx.state, ctx.dtype)).to(ctx.of_x), None, None


def _by_products(layer: Any) -> Any:
    def forward(x: Tensor) -> Tensor:
        if not torch.is_grad_enabled() or not x.requires_grad or (layer.bias is not None and layer.bias.requires_grad):
            return type(layer).forward(layer, x)
        found: Any = _Product.apply(x, layer.weight, layer)
        return found

    return forward
