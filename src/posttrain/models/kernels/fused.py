"""The same functions as transformers' and peft's modules, with fewer passes over memory and fewer numbers kept for the backward.

Linear layers with LoRA: the update is added into the layer's own output, in the base's number format, with the scale folded into
B. RMSNorm and SwiGLU: what can be computed again from what is kept anyway is not kept. The plain reference of each is the
module's own forward, to which a call that asks for more (DoRA, autocast) is handed on. choice.py gives them to modules.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from posttrain.models.kernels.pointwise import silu_product, silu_product_backward
from posttrain.models.kernels.tiles import in_tiles
from posttrain.models.quantization.nf4 import dense_weight
from posttrain.models.quantization.packed import Packed, packed_of, stored
from posttrain.training.at_rest import made_once

OWN = "_own_forward"  # of a module that has a leaner way: what it did before


def replace_forward(module: nn.Module, forward: Callable[..., Any]) -> None:
    """Give a module a leaner way. Its weights and their names stay as they are."""
    if not hasattr(module, OWN):
        setattr(module, OWN, module.forward)
        module.forward = forward.__get__(module)


def lora_forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """peft's forward of a linear layer, for plain LoRA adapters; whatever else is left to peft."""
    if args or kwargs or not is_plain(self, x):
        return self._own_forward(x, *args, **kwargs)
    return with_lora(self, x, None)


def is_plain(layer: Any, x: Tensor) -> bool:
    """Is this call `_LoraLinear`, of `x`? Not with a base that trains, another format, DoRA, hooks, autocast, two dropouts."""
    names = _speaking(layer)
    if not names or layer.merged or (torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type)):
        return False
    if any(name in layer.lora_variant or layer.lora_bias.get(name) for name in names):
        return False
    if any(part[name]._forward_hooks or part[name]._forward_pre_hooks for name in names for part in (layer.lora_A, layer.lora_B)):
        return False
    if len(names) > 1 and _dropout(layer, names):
        return False
    base = layer.base_layer
    if held_as(base).weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return False
    return (_computes_in(base) or x.dtype) == x.dtype


def _computes_in(base: Any) -> torch.dtype | None:
    """None for a quantized layer that takes whatever it is given."""
    weight, state = held_as(base)
    if isinstance(state, Packed):
        return state.compute_dtype
    return weight.dtype if state is None else base.compute_dtype


class HeldAs(NamedTuple):
    """A base's weight as it lies in memory, and what says for what it stands; None where it is the weight itself."""

    weight: Tensor
    state: Any


def held_as(base: Any) -> HeldAs:
    """Of a linear layer under an adapter."""
    weight = stored(base, "weight")
    return HeldAs(weight, packed_of(base, "weight") or getattr(weight, "quant_state", None))


def _speaking(layer: Any) -> list[str]:
    return [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]


def _dropout(layer: Any, names: Sequence[str]) -> float:
    """The largest share of its inputs that one of these adapters does not hear."""
    parts = [layer.lora_dropout[name] for name in names] if layer.training else []
    return max((part.p for part in parts if isinstance(part, nn.Dropout)), default=0.0)


def joined_adapters(layer: Any) -> tuple[Tensor, Tensor] | None:
    """All that the active adapters of a layer with `lora_forward` add, as two factors: A [R, in] and s B [out, R], in the format
    that the layer computes in. None for another module, and where they do more than add a product."""
    if getattr(getattr(layer, "forward", None), "__func__", None) is not lora_forward:
        return None
    dtype = _computes_in(layer.base_layer)
    if dtype is None or not is_plain(layer, torch.empty(0, dtype=dtype, device=held_as(layer.base_layer).weight.device)):
        return None
    if _dropout(layer, _speaking(layer)):
        return None
    with torch.no_grad():
        return _joined(*_factors(layer), dtype)


def _factors(layer: Any) -> tuple[list[Tensor], tuple[float, ...]]:
    names = _speaking(layer)
    factors = [part for name in names for part in (layer.lora_A[name].weight, layer.lora_B[name].weight)]
    return factors, tuple(float(layer.scaling[name]) for name in names)


def with_lora(layer: Any, x: Tensor, gated: Tensor | None, numbers: bool = True) -> Tensor:
    """`_LoraLinear` of a layer for which `is_plain`, of x or of silu(x) * gated. numbers: false where the way of the gradient is
    all that is wanted."""
    names, base = _speaking(layer), layer.base_layer
    factors, scales = _factors(layer)
    weight, quantized = held_as(base)
    if not (quantized is None or isinstance(quantized, Packed) or torch.is_grad_enabled()):
        x = x if gated is None else silu_product(x, gated)
        down, up = _joined(factors, scales, x.dtype)
        return without_gradient(base, x).add_((x @ down.T) @ up.T)
    rest: list[Tensor] | None = None if gated is None else []
    y: Any = _LoraLinear.apply(x, gated, weight, base.bias, quantized, scales, _dropout(layer, names), rest, *factors)
    if rest and numbers:
        y = _Product.apply(y, *rest, weight, base.bias, quantized)
    return y.view(*x.shape[:-1], -1)  # not within: a model may write into its layers' outputs (Gemma 3n)


def without_gradient(base: Any, x: Tensor) -> Tensor:
    """base(x) of a quantized layer: by its dense copy, or by bitsandbytes, which has kernels of its own for a few rows."""
    weight, state = held_as(base)
    return linear(x, dense_weight(weight, state, x.dtype), base.bias) if hasattr(state, "dense") else base(x)


class _LoraLinear(torch.autograd.Function):
    """y = x W' + b + sum_i s_i (drop(x) A_i') B_i' (Hu et al. 2021, arXiv 2106.09685, eq. 3), W and b frozen.

    x: [..., in], or with `gated` silu(x) * gated, which is made again in the backward, as is what dropout leaves of it. factors:
    A_1 [r, in], B_1 [out, r], A_2, ... in a format of their own, computed with in x's. rest: a list, for what `_Product` makes y
    of; what is returned then has y's shape and its gradient, and no numbers. y: [n, out].
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, gated: Tensor | None, weight: Tensor, bias: Tensor | None,
        quantized: Any, scales: tuple[float, ...], dropout: float, rest: list[Tensor] | None, *factors: Tensor,
    ) -> Tensor:  # fmt: skip
        flat = (x if gated is None else silu_product(x, gated)).reshape(-1, x.shape[-1])
        down, up = _joined(factors, scales, x.dtype)
        heard, mask = torch.native_dropout(flat, dropout, True) if dropout else (flat, None)
        inner = heard @ down.T
        trains = any(ctx.needs_input_grad[OTHERS:])
        needs_x = trains or gated is not None
        ctx.save_for_backward(x if needs_x else None, gated, inner if trains else None, mask, weight, down, up)
        ctx.quantized, ctx.scales, ctx.heard = quantized, scales, 1.0 / (1.0 - dropout) if dropout < 1 else 0.0
        ctx.factors = [(factor.shape[0], factor.dtype) for factor in factors]
        ctx.shape = x.shape
        if rest is None:
            return _product(flat, inner, up, weight, bias, quantized)
        rest += [flat, inner, up]
        return flat.new_empty(()).expand(len(flat), len(up))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, gated, inner, mask, weight, down, up = ctx.saved_tensors
        grad = grads[0]
        behind = grad @ up
        of_x = of_gated = None
        if any(ctx.needs_input_grad[:2]):
            of_x = grad @ dense_weight(weight, ctx.quantized, grad.dtype)
            of_x = of_x.addmm_(behind, down) if mask is None else of_x.add_(_heard(behind @ down, mask, ctx.heard))
            of_x = of_x.reshape(ctx.shape)
        if gated is not None:
            assert of_x is not None
            of_x, of_gated, x = silu_product_backward(of_x, x, gated, again=True)
        heard: Any = x if x is None or mask is None else _heard(x.reshape(mask.shape), mask, ctx.heard)
        return of_x, of_gated, *[None] * (OTHERS - 2), *_of_factors(ctx, grad, behind, heard, inner)


class _Product(torch.autograd.Function):
    """The product that a `_LoraLinear` has left out, which keeps nothing. An MLP ends with it, so a layer that is computed again
    for its backward is done before it: all that the backward asks for is there."""

    @staticmethod
    def forward(
        ctx: Any, y: Tensor, flat: Tensor, inner: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, quantized: Any
    ) -> Tensor:
        return _product(flat, inner, up, weight, bias, quantized)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return grads[0], *[None] * 6


def _product(flat: Tensor, inner: Tensor, up: Tensor, weight: Tensor, bias: Tensor | None, quantized: Any) -> Tensor:
    return linear(flat, dense_weight(weight, quantized, flat.dtype), bias).addmm_(inner, up.T)


def _heard(x: Tensor, mask: Tensor, scale: float) -> Tensor:
    """What dropout with this mask leaves of x, or of a gradient behind it."""
    return torch.ops.aten.native_dropout_backward(x, mask, scale)


def _joined(factors: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """All A one above the other [R, in], and all s B side by side [out, R]: once a step, where weights are at rest."""
    return made_once(_join, factors, scales, dtype)


def _join(factors: Sequence[Tensor], scales: Sequence[float], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    up = [(b if scale == 1 else b * scale).to(dtype) for b, scale in zip(factors[1::2], scales, strict=True)]
    if len(up) == 1:  # as they are where nothing is to be joined
        return factors[0].to(dtype), up[0]
    return torch.cat([a.to(dtype) for a in factors[0::2]]), torch.cat(up, dim=1)


OTHERS = 8  # arguments of _LoraLinear before its factors


def _of_factors(ctx: Any, grad: Tensor, behind: Tensor, x: Tensor, inner: Tensor) -> list[Tensor | None]:
    found: list[Tensor | None] = [None] * len(ctx.factors)
    at = 0
    for i, scale in enumerate(ctx.scales):
        (rank, dtype), (_, dtype_up) = ctx.factors[2 * i : 2 * i + 2]
        rows = slice(at, at + rank)
        at = rows.stop
        if ctx.needs_input_grad[OTHERS + 2 * i]:
            found[2 * i] = (behind[:, rows].T @ x.reshape(-1, x.shape[-1])).to(dtype)
        if ctx.needs_input_grad[OTHERS + 2 * i + 1]:
            found[2 * i + 1] = (grad.T @ inner[:, rows]).to(dtype_up).mul_(scale)
    return found


def norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """LlamaRMSNorm's forward."""
    return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon)


class RMSNorm(torch.autograd.Function):
    """w * x / sqrt(mean(x^2) + eps), in float32 up to the product with w (Zhang and Sennrich 2019, arXiv 1910.07467)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, scale)
        return weight * (wide * scale).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor | None, None]:
        x, weight, scale = ctx.saved_tensors
        normal = x.float() * scale
        of_weight = None
        if ctx.needs_input_grad[1]:
            of_weight = (grads[0] * normal.to(x.dtype)).reshape(-1, x.shape[-1]).sum(0, dtype=weight.dtype)
        inner = (grads[0] * weight).float()
        of_x = scale * (inner - normal * (inner * normal).mean(-1, keepdim=True))
        return of_x.to(x.dtype), of_weight, None


def mlp_forward(self: Any, x: Tensor) -> Tensor:
    """LlamaMLP's forward, down(silu(gate(x)) * up(x)). What goes into `down` is kept as the two that it is made of."""
    return in_tiles(self, partial(_mlp, self), x)


def _mlp(mlp: Any, x: Tensor, numbers: bool) -> Tensor:
    gate, up, down = mlp.gate_proj(x), mlp.up_proj(x), mlp.down_proj
    if hasattr(down, OWN) and gate.dtype == up.dtype and is_plain(down, gate):
        return with_lora(down, gate, up, numbers)
    return down(SiluProduct.apply(gate, up))


class SiluProduct(torch.autograd.Function):
    """silu(gate) * up, elementwise (Shazeer 2020, arXiv 2002.05202)."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu_product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return silu_product_backward(grads[0], *ctx.saved_tensors, again=False)[:2]
