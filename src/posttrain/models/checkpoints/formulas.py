"""What the numbers of a quantized checkpoint stand for, as the definitions of the formats have it. All results are float32."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# the sixteen numbers of FP4 (E2M1: sign, two bits of exponent, one of mantissa), OCP Microscaling Formats 1.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a 32-bit word the columns 0, 1, ... lie


def exponents(scale: Tensor) -> Tensor:
    """Scales as numbers: bytes are exponents of 2, with a bias of 127 (E8M0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def fp4(packed: Tensor) -> Tensor:
    """[..., n] bytes, the lower half first -> [..., 2 n] numbers."""
    both = packed.view(torch.uint8)
    pairs = torch.stack([both & 15, both >> 4], dim=-1).flatten(-2)
    return torch.tensor(E2M1, device=packed.device)[pairs.int()]


def scaled(weight: Tensor, scale: Tensor, block: Sequence[int] | None = None, zero: Tensor | None = None) -> Tensor:
    """(weight - zero) scale, where a scale and a zero belong to all of it, to a row, to a group of a row or to a block.

    weight: [..., rows, columns], whose numbers count as they are. scale, zero: one, [rows], or a grid over the last two
    dimensions. block: rows and columns of a block, of which the last may be cut; None: the grid divides the weight.
    """
    shape = weight.shape
    value = weight.float()
    if zero is not None:
        value = value - _spread(zero.float(), shape, block)
    return value * _spread(exponents(scale), shape, block)


def to_fp8(weight: Tensor, block: Sequence[int]) -> tuple[Tensor, Tensor]:
    """(E4M3, scales of blocks, whose largest numbers become 448) of [..., rows, columns]."""
    rows, columns = weight.shape[-2:]
    cut = torch.nn.functional.pad(weight, (0, -columns % block[1], 0, -rows % block[0]))
    grid = cut.unflatten(-1, (-1, block[1])).unflatten(-3, (-1, block[0])).abs().amax((-3, -1)) / 448
    return (weight / _spread(grid.clamp(min=1e-30), weight.shape, block)).to(torch.float8_e4m3fn), grid


def _spread(grid: Tensor, shape: Sequence[int], block: Sequence[int] | None) -> Tensor:
    if grid.numel() == 1:
        return grid.reshape(())
    if grid.dim() == 1:
        grid = grid[:, None]
    for axis in (-2, -1):
        size, cells = shape[axis], grid.shape[axis]
        if cells in (1, size):
            continue
        asked = block[axis] if block else 0
        width = asked if asked and -(-size // asked) == cells else -(-size // cells)
        grid = grid.repeat_interleave(width, dim=axis).narrow(axis, 0, size)
    return grid


def mxfp4(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., rows, groups, 16] bytes and [..., rows, groups] exponents -> [..., rows, 32 groups]."""
    return (fp4(blocks) * exponents(scales)[..., None]).flatten(-2)


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """Numbers of so many bits from 32-bit words, the lowest bits first, along an axis: int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    parts = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2) if axis in (-1, words.dim() - 1) else parts.movedim(-1, axis + 1).flatten(axis, axis + 1)


def gptq(words: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, bits: int, zero_is_less_one: bool) -> Tensor:
    """[out, in]. words: [in / n, out]; zeros: [groups, out / n]; scales: [groups, out]; group: of each input, its number."""
    value = unpacked(words, bits, 0).float()
    zero = unpacked(zeros, bits, 1).float() + float(zero_is_less_one)
    index = group.long()
    return ((value - zero[index]) * scales.float()[index]).T


def awq(words: Tensor, zeros: Tensor, scales: Tensor) -> Tensor:
    """[out, in]. words: [in, out / 8]; zeros: [groups, out / 8]; scales: [groups, out]."""
    value, zero = (_columns(each).float() for each in (words, zeros))
    width = value.shape[0] // zero.shape[0]
    return ((value - zero.repeat_interleave(width, 0)) * scales.float().repeat_interleave(width, 0)).T


def _columns(words: Tensor) -> Tensor:
    nibbles = unpacked(words, 4, 1).unflatten(1, (-1, 8))
    return nibbles[..., list(AWQ_ORDER)].flatten(1)
