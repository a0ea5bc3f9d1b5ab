"""The Triton kernels of pointwise.py. They compute in float32 and round once."""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 1024  # numbers of a program
HEADS = 8  # that a program of `_rotate` turns


@triton.jit
def _product(gate, up, out, count, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    u = tl.load(up + at, at < count, 0.0).to(tl.float32)
    tl.store(out + at, g * tl.sigmoid(g) * u, at < count)


@triton.jit
def _product_backward(grad, gate, up, of_gate, of_up, out, count, AGAIN: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    d = tl.load(grad + at, at < count, 0.0).to(tl.float32)
    g = tl.load(gate + at, at < count, 0.0).to(tl.float32)
    u = tl.load(up + at, at < count, 0.0).to(tl.float32)
    sigmoid = tl.sigmoid(g)
    active = g * sigmoid
    tl.store(of_gate + at, d * u * (sigmoid + active * (1.0 - sigmoid)), at < count)
    tl.store(of_up + at, d * active, at < count)
    if AGAIN:
        tl.store(out + at, active * u, at < count)


@triton.jit
def _rotate(
    x, cos, sin, out, tokens, heads, half, x_batch, x_head, x_token, out_batch, out_token, cos_batch, cos_token,
    BACK: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    batch, token = row // tokens, row % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    place = tl.arange(0, HALF)[None, :]
    there, known = (head < heads) & (place < half), place < half
    turn = batch * cos_batch + token * cos_token + place
    cos_1, cos_2 = tl.load(cos + turn, known, 0.0).to(tl.float32), tl.load(cos + turn + half, known, 0.0).to(tl.float32)
    sin_1, sin_2 = tl.load(sin + turn, known, 0.0).to(tl.float32), tl.load(sin + turn + half, known, 0.0).to(tl.float32)
    read = x + batch * x_batch + token * x_token + head * x_head + place
    first, second = tl.load(read, there, 0.0).to(tl.float32), tl.load(read + half, there, 0.0).to(tl.float32)
    write = out + batch * out_batch + token * out_token + head * 2 * half + place
    if BACK:
        tl.store(write, first * cos_1 + second * sin_2, there)
        tl.store(write + half, second * cos_2 - first * sin_1, there)
    else:
        tl.store(write, first * cos_1 - second * sin_1, there)
        tl.store(write + half, second * cos_2 + first * sin_2, there)


def product(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up."""
    gate, up = gate.contiguous(), up.contiguous()
    out = torch.empty_like(gate)
    with torch.cuda.device(gate.device):
        _run(_product, out.numel(), gate, up, out)
    return out


def product_backward(grad: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """The gradients of gate and of up; with `again` also silu(gate) * up, and up's is written over the one that is given."""
    grad, gate, up = grad.contiguous(), gate.contiguous(), up.contiguous()
    of_gate, of_up = torch.empty_like(gate), grad if again else torch.empty_like(up)
    out = torch.empty_like(gate) if again else None
    with torch.cuda.device(gate.device):
        _run(_product_backward, gate.numel(), grad, gate, up, of_gate, of_up, gate if out is None else out, AGAIN=again)
    return of_gate, of_up, out


def _run(kernel: Any, count: int, *given: Any, **choices: Any) -> None:
    if count:
        kernel[(triton.cdiv(count, BLOCK),)](*given, count, **choices, BLOCK=BLOCK)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, dtype: torch.dtype, back: bool) -> Tensor:
    """RoPE of x [batch, heads, tokens, size], or with `back` the gradient behind it, in `dtype`; laid out [batch, tokens, heads,
    size]."""
    batch, heads, tokens, size = x.shape
    x, cos, sin = x if x.stride(-1) == 1 else x.contiguous(), cos.contiguous(), sin.contiguous()
    out = torch.empty(batch, tokens, heads, size, dtype=dtype, device=x.device)
    strides = (x.stride(0), x.stride(1), x.stride(2), *out.stride()[:2], cos.stride(0) if len(cos) > 1 else 0, cos.stride(1))
    kernel: Any = _rotate
    if out.numel():
        with torch.cuda.device(x.device):
            kernel[(batch * tokens, triton.cdiv(heads, HEADS))](
                x, cos, sin, out, tokens, heads, size // 2, *strides, BACK=back, HEADS=HEADS,
                HALF=triton.next_power_of_2(size // 2),
            )  # fmt: skip
    return out.transpose(1, 2)
