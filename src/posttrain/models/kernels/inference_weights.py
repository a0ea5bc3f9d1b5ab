"""A model that stays as it is for a while, as it does in a rollout: what follows from its weights alone is worked out once.

Adapters of a layer are joined and cast once, nothing is kept for a backward (liger-kernel's norm, one kernel, stays), and
on a CPU weights are laid out as its products read them, which a product of few rows would otherwise do anew each time: it then
takes a half or a third of the time. The plain reference is the model outside of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain.models.kernels.fused import OWN, held_as, joined_adapters, without_gradient
from posttrain.models.kernels.liger import FORWARDS

Forward = Callable[[Tensor], Tensor]

ROWS = 8  # that weights are laid out for; others are computed with the same layout
# Of the machine's memory, what linear layers may take twice. Of all of it, not of what is free: a resumed run must do what the
# first did, and in float32 the layout changes the last bits.
SHARE = 0.25


@contextmanager
def inference_weights(model: nn.Module) -> Iterator[None]:
    """Inside, weights and active adapters must not change, and no gradient is to be had.

    The same function within rounding, and bit for bit in 16-bit formats where no adapter is.
    """
    lays_out = _lays_out(model)
    changed: list[Any] = [module for module in model.modules() if hasattr(module, OWN) or type(module) is nn.Linear]
    before = [vars(module).get("forward") for module in changed]
    parts: set[nn.Module] = set()  # of a layer that does their work
    try:
        for module in changed:  # a layer comes before its parts
            if module in parts:
                continue
            adapters = joined_adapters(module)
            if adapters is not None:
                parts.update(module.modules())
                module.forward = _with_adapters(module, *adapters, lays_out=lays_out)
            elif hasattr(module, OWN) and getattr(module.forward, "__func__", None) not in FORWARDS.values():
                module.forward = getattr(module, OWN)
            elif lays_out and _fits(module.weight):
                module.forward = _laid_out(module.weight, module.bias)
        yield
    finally:
        for module, forward in zip(changed, before, strict=True):
            if forward is not None:
                module.forward = forward
            elif "forward" in vars(module):
                del module.forward


def missing() -> str:
    """Which of oneDNN's operations for weights laid out, none of them public, this torch does not have though it has oneDNN; ''
    where it has all."""
    if not torch.backends.mkldnn.is_available():
        return ""
    names = ("_reorder_linear_weight", "_linear_pointwise", "_is_mkldnn_bf16_supported")
    return next((f"torch.ops.mkldnn.{name}" for name in names if not hasattr(torch.ops.mkldnn, name)), "")


def _lays_out(model: nn.Module) -> bool:
    """Is this a CPU whose library has a layout of its own for weights, and memory to hold them twice?"""
    if not torch.backends.mkldnn.is_available() or missing() or torch.is_autocast_enabled("cpu"):
        return False
    size = sum(p.numel() * p.element_size() for p in model.parameters() if _fits(p))
    return size <= SHARE * psutil.virtual_memory().total


def _fits(weight: Tensor) -> bool:
    if weight.device.type != "cpu" or weight.dim() != 2:
        return False
    supported: Any = torch.ops.mkldnn
    return weight.dtype == torch.float32 or (weight.dtype == torch.bfloat16 and supported._is_mkldnn_bf16_supported())


def _laid_out(weight: Tensor, bias: Tensor | None) -> Forward:
    """x -> x W' + b, by oneDNN's own layout of W."""
    ops: Any = torch.ops.mkldnn
    packed, b = ops._reorder_linear_weight(weight.detach(), ROWS), None if bias is None else bias.detach()

    def forward(x: Tensor) -> Tensor:
        return ops._linear_pointwise(x, packed, b, "none", [], "")

    return forward


def _with_adapters(layer: Any, down: Tensor, up: Tensor, *, lays_out: bool) -> Forward:
    """x -> base(x) + (x down') up'. down: [R, in]; up: [out, R], scaled. An x of another format goes the layer's own way."""
    base, other, size = layer.base_layer, layer.forward, len(up)
    weight, state = held_as(base)
    quantized = state is not None
    back = up.T.contiguous()
    if lays_out and not quantized and _fits(weight):  # the adapters' first product is some more columns of the base's
        bias = None if base.bias is None else torch.cat([base.bias.detach(), base.bias.new_zeros(len(down))])
        product, wide = _laid_out(torch.cat([weight.detach(), down]), bias), back.float()

        def add(x: Tensor) -> Tensor:
            y = product(x).float()  # so small a product is quicker in float32 than oneDNN's in 16 bits
            return y[:, :size].addmm_(y[:, size:], wide).to(x.dtype)
    else:
        into = down.T.contiguous()

        def add(x: Tensor) -> Tensor:
            y = without_gradient(base, x) if quantized else linear(x, weight, base.bias)
            return y.addmm_(x @ into, back)

    def forward(x: Tensor) -> Tensor:
        if x.dtype != down.dtype:
            return other(x)
        return add(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], size)

    return forward
