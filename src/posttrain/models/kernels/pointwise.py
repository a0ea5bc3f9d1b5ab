"""Functions of single numbers that torch computes in many passes over memory, in one: RoPE, and SwiGLU's product.

On CUDA by Triton, where it compiles and gives what torch does; elsewhere by torch. Measured on an H100, LoRA on 8B of 8,192
tokens a step: of 623 ms RoPE took about 50 and SwiGLU's product 47, for 8 and 23 that memory needs.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from posttrain.errors import first_line
from posttrain.models.kernels.usable import beside, card_of

SHAPE = (2, 3, 5, 16)  # of what is tried: batch, heads, tokens, numbers of a head


def silu_product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    return _triton().product(gate, up) if by_triton(gate, up) else silu(gate) * up


def silu_product_backward(grad: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and of up, from that of silu(gate) * up. With `again` also that product, and the gradient that is
    given is the caller's own: up's is written over it, for these are the widest tensors of a layer."""
    if by_triton(grad, gate, up):
        return _triton().product_backward(grad, gate, up, again)
    active = silu(gate)
    of_gate = torch.ops.aten.silu_backward(grad * up, gate)
    return (of_gate, grad.mul_(active), active.mul_(up)) if again else (of_gate, grad * active, None)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """RoPE of x [batch, heads, tokens, size], by torch. cos, sin: [batch or 1, tokens, size]."""
    first, second = x.chunk(2, dim=-1)
    return x * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)


def rotary(plain: Callable[..., tuple[Tensor, Tensor]]) -> Callable[..., tuple[Tensor, Tensor]]:
    """A family's `apply_rotary_pos_emb`, by Triton where it can be. What else a family gives it, under whatever name, is its own
    function's matter."""

    @cache
    def made_in(dtype: torch.dtype, of_angles: torch.dtype) -> torch.dtype:
        """The format of what the family makes of queries and angles in two: the wider, or that of the queries."""
        one = torch.ones(1, 1, 1, 2, dtype=dtype, device="cpu")
        return plain(one, one, *(one[0].to(of_angles),) * 2)[0].dtype

    def turned(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *more: Any, **named: Any) -> tuple[Tensor, Tensor]:
        if not (more or named) and q.shape[-1] == cos.shape[-1] and on_a_card(q):
            found: Any = [Rotated.apply(x, cos, sin, made_in(x.dtype, cos.dtype)) for x in (q, k)]
            return found[0], found[1]
        return plain(q, k, cos, sin, *more, **named)

    return turned


class Rotated(torch.autograd.Function):
    """The same by Triton, in `dtype`; its backward is the turn back (Su et al. 2021, arXiv 2104.09864, eq. 34)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(cos, sin)
        ctx.dtype = x.dtype
        return _triton().rotated(x, cos, sin, dtype, back=False)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _triton().rotated(grads[0], *ctx.saved_tensors, ctx.dtype, back=True), None, None, None


def by_triton(*tensors: Tensor) -> bool:
    """Are these for the kernels of products: of one format, on a card?"""
    return on_a_card(tensors[0]) and all(x.dtype == tensors[0].dtype for x in tensors)


def on_a_card(x: Tensor) -> bool:
    """Does it lie on one on which the kernels are right?"""
    return x.is_cuda and not obstacle(x.device)


@cache
def obstacle(device: torch.device) -> str:
    """'' where the kernels run on this device and compute what torch does, else why they are not used there."""
    if not card_of(device).compiles:
        return "Triton and a C compiler (gcc, or CC=...) are not here"
    angles = torch.linspace(0, 3, SHAPE[2] * SHAPE[3], device=device).view(1, SHAPE[2], SHAPE[3])
    wide, half = (angles.cos(), angles.sin()), (angles.cos().bfloat16(), angles.sin().bfloat16())
    tries: dict[str, tuple[Callable[..., Tensor], Callable[..., Tensor], int]] = {
        "RoPE": (lambda x: Rotated.apply(x, *half, x.dtype), lambda x: rotate(x, *half), 1),
        "RoPE of two formats": (lambda x: Rotated.apply(x, *wide, torch.float32), lambda x: rotate(x, *wide), 1),
        "SwiGLU": (_Product.apply, lambda gate, up: silu(gate) * up, 2),
    }
    for name, (ours, plain, inputs) in tries.items():
        try:
            wrong = beside(ours, plain, [SHAPE] * inputs, device)
        except Exception as error:  # of Triton, a compiler or a driver: whatever it is, torch computes it
            return f"Triton's {name} does not run here ({first_line(error)})"
        if wrong:
            return f"Triton's {name} {wrong}"
    return ""


class _Product(torch.autograd.Function):
    """What is tried; a model's is fused.SiluProduct, which asks first whether this is right."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return _triton().product(gate, up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return _triton().product_backward(grads[0].clone(), *ctx.saved_tensors, again=True)[:2]


def _triton() -> Any:
    """Imported where it is used: without CUDA there is no Triton."""
    return import_module("posttrain.models.kernels.pointwise_triton")
