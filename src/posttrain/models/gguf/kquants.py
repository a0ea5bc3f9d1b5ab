"""llama.cpp's K-quants, which the gguf package reads and does not write: 256 figures in small blocks, with coded scales."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

SUPER = 256  # figures that share a scale of scales
AT_ONCE = 4096  # such blocks
TRIES = 12  # scales that are tried for a small block


def quantize_k(values: Tensor, kind: Kind) -> np.ndarray:
    """values: [..., columns], columns a multiple of 256. Returns bytes, uint8 [..., bytes of a row]. kind: of KINDS."""
    blocks = values.float().reshape(-1, SUPER)
    parts = [KINDS[kind](part) for part in blocks.split(AT_ONCE)]
    return torch.cat(parts).reshape(*values.shape[:-1], -1).numpy()


def _half(figures: Tensor) -> tuple[Tensor, Tensor]:
    """As they are kept, in two bytes, and what is read of that: [blocks, 2] and [blocks, 1]."""
    kept = figures.half()[:, None]
    return kept.view(torch.uint8), kept.float()


def _least(small: Tensor, top: int) -> tuple[Tensor, Tensor]:
    """Scale and offset, both 0 or more, by which codes from 0 to `top` are nearest: scale * code - offset. small: [..., 32].

    Errors count by a figure's own size beside the block's: the large ones matter more. For each of some scales the codes are
    set, and then scale and offset anew by least squares.
    """
    low, high = small.amin(-1, keepdim=True).clamp(max=0), small.amax(-1, keepdim=True)
    weight = small.square().mean(-1, keepdim=True).sqrt() + small.abs()
    span = (high - low).clamp(min=1e-12)
    best, scale, offset = torch.full_like(low, torch.inf), span / top, -low
    total, first = weight.sum(-1, keepdim=True), (weight * small).sum(-1, keepdim=True)
    for step in range(TRIES):
        code = ((top - 0.9 + 0.15 * step) * (small - low) / span).round().clamp(0, top)
        weighted = weight * code
        one, two, mixed = (t.sum(-1, keepdim=True) for t in (weighted, weighted * code, weighted * small))
        bottom = (total * two - one * one).clamp(min=1e-20)
        slope, start = (total * mixed - first * one) / bottom, (two * first - one * mixed) / bottom
        slope = torch.where(start > 0, mixed / two.clamp(min=1e-20), slope)
        start = start.clamp(max=0)
        error = (weight * (slope * code + start - small).square()).sum(-1, keepdim=True)
        better = (error < best) & (slope > 0)
        best, scale, offset = (torch.where(better, a, b) for a, b in ((error, best), (slope, scale), (-start, offset)))
    return scale.squeeze(-1), offset.squeeze(-1)


def _with_offsets(blocks: Tensor, top: int) -> tuple[list[Tensor], Tensor]:
    """The head of a block (scale of scales and of offsets, and both in six bits) and the codes, [blocks, 8, 32]."""
    small = blocks.view(-1, 8, 32)
    scale, offset = _least(small, top)
    (scales, of_scales), (offsets, of_offsets) = (_half(part.amax(-1) / 63) for part in (scale, offset))
    six = [(part / of.clamp(min=1e-12)).round().clamp(0, 63).byte() for part, of in ((scale, of_scales), (offset, of_offsets))]
    step, start = (of * part for of, part in zip((of_scales, of_offsets), six, strict=True))
    code = torch.where(step[..., None] > 0, (small + start[..., None]) / step[..., None].clamp(min=1e-12), 0)
    first, last = ([part[:, :4] for part in six], [part[:, 4:] for part in six])
    packed = [first[i] | (last[i] >> 4 << 6) for i in (0, 1)] + [(last[0] & 15) | ((last[1] & 15) << 4)]
    return [scales, offsets, *packed], code.round().clamp(0, top).byte()


def _nibbles(code: Tensor) -> Tensor:
    """Of two rows after each other one: the first in the low bits."""
    pairs = (code & 15).view(len(code), 4, 2, 32)
    return (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)


def _q4(blocks: Tensor) -> Tensor:
    head, code = _with_offsets(blocks, 15)
    return torch.cat([*head, _nibbles(code)], dim=1)


def _q5(blocks: Tensor) -> Tensor:
    head, code = _with_offsets(blocks, 31)
    fifth = ((code >> 4) << torch.arange(8, dtype=torch.uint8)[:, None]).sum(1, dtype=torch.uint8)
    return torch.cat([*head, fifth, _nibbles(code)], dim=1)


def _q6(blocks: Tensor) -> Tensor:
    """Codes from -32 to 31 without offsets, scales of eight bits for 16 figures each."""
    small = blocks.view(-1, 16, 16)
    far = small.gather(-1, small.abs().argmax(-1, keepdim=True))
    far = torch.where(far == 0, 1e-12, far)
    weight, best, scale = small.square(), torch.full_like(far, -torch.inf), torch.zeros_like(far)
    for step in range(TRIES):
        code = ((-32.6 + 0.1 * step) * small / far).round().clamp(-32, 31)
        mixed, two = (weight * small * code).sum(-1, keepdim=True), (weight * code * code).sum(-1, keepdim=True).clamp(min=1e-30)
        better = mixed * mixed / two > best
        best, scale = torch.where(better, mixed * mixed / two, best), torch.where(better, mixed / two, scale)
    scale = scale.squeeze(-1)
    kept, of = _half(scale.gather(-1, scale.abs().argmax(-1, keepdim=True)).squeeze(-1) / -128)
    eight = torch.where(of == 0, 0, scale / torch.where(of == 0, 1, of)).round().clamp(-128, 127)
    step = (of * eight)[..., None]
    code = torch.where(step == 0, 0, small / torch.where(step == 0, 1, step)).round().clamp(-32, 31).add(32).byte()
    quarters = code.view(-1, 2, 4, 32)  # of each half
    low = (quarters[:, :, :2] & 15) | ((quarters[:, :, 2:] & 15) << 4)
    high = ((quarters >> 4) << torch.tensor([0, 2, 4, 6], dtype=torch.uint8)[:, None]).sum(2, dtype=torch.uint8)
    return torch.cat([low.flatten(1), high.flatten(1), eight.to(torch.int8).view(torch.uint8), kept], dim=1)


KINDS: dict[Kind, Callable[[Tensor], Tensor]] = {Kind.Q4_K: _q4, Kind.Q5_K: _q5, Kind.Q6_K: _q6}
