"""What the numbers of a quantized checkpoint stand for, as the definitions of the formats have it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

# the sixteen numbers of FP4 (E2M1: sign, two bits of exponent, one of mantissa), OCP Microscaling Formats 1.0
E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
AWQ_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)  # where in a 32-bit word the columns 0, 1, ... lie

_BYTES = torch.arange(256, dtype=torch.uint8)
TABLES = {  # what a code stands for, in float32
    "e2m1": torch.tensor(E2M1),
    "e4m3": _BYTES.view(torch.float8_e4m3fn).float(),
    "e5m2": _BYTES.view(torch.float8_e5m2).float(),
    "int8": _BYTES.view(torch.int8).float(),
    **{f"unsigned {bits}": torch.arange(2.0**bits) for bits in (2, 4, 8)},
    **{f"offset {bits}": torch.arange(2.0**bits) - 2 ** (bits - 1) for bits in (1, 2, 4, 8)},
}
KINDS = {torch.float8_e4m3fn: "e4m3", torch.float8_e5m2: "e5m2", torch.int8: "int8"}


class Elements(NamedTuple):
    """A quantized weight, number by number: each is (TABLES[kind][code] - zero) scale.

    codes: uint8, of the weight's shape. scale (float32) and zero (whole numbers): of a shape that spreads over it.
    """

    kind: str
    codes: Tensor
    scale: Tensor
    zero: Tensor | None = None

    def meant(self) -> Tensor:
        """The weight, in float32."""
        value = TABLES[self.kind].to(self.codes.device)[self.codes.int()]
        if self.zero is not None:
            value = value - self.zero.float()
        return value * self.scale

    @property
    def transposed(self) -> Elements:
        """The same, of the transposed weight."""
        zero = self.zero if self.zero is None or self.zero.dim() < 2 else self.zero.mT
        return Elements(self.kind, self.codes.mT, self.scale.mT if self.scale.dim() > 1 else self.scale, zero)


def exponents(scale: Tensor) -> Tensor:
    """Scales as numbers: bytes are exponents of 2, with a bias of 127 (E8M0)."""
    return torch.exp2(scale.float() - 127) if scale.dtype == torch.uint8 else scale.float()


def nibbles(packed: Tensor) -> Tensor:
    """[..., n] bytes, the lower half first -> [..., 2 n] codes."""
    both = packed.view(torch.uint8)
    return torch.stack([both & 15, both >> 4], dim=-1).flatten(-2)


def scaled(weight: Tensor, scale: Tensor, block: Sequence[int] | None = None, zero: Tensor | None = None) -> Elements:
    """(weight - zero) scale, where a scale and a zero belong to all of it, to a row, to a group of a row or to a block.

    weight: [..., rows, columns] in FP8 or INT8, or codes of E2M1 in bytes. scale, zero: one, [rows], or a grid over the last two
    dimensions. block: rows and columns of a block, of which the last may be cut; None: the grid divides the weight.
    """
    if weight.dtype == torch.uint8:
        return of_codes("e2m1", weight, scale, block, zero)
    return of_codes(KINDS[weight.dtype], weight.view(torch.uint8), scale, block, zero)


def of_codes(kind: str, codes: Tensor, scale: Tensor, block: Sequence[int] | None, zero: Tensor | None) -> Elements:
    """As `scaled`, of codes of a kind."""
    shape = codes.shape
    return Elements(
        kind, codes, _spread(exponents(scale), shape, block), None if zero is None else _spread(zero.float(), shape, block)
    )


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


def mxfp4(blocks: Tensor, scales: Tensor) -> Elements:
    """[..., rows, groups, 16] bytes and [..., rows, groups] exponents -> a weight of [..., rows, 32 groups]."""
    return Elements("e2m1", nibbles(blocks).flatten(-2), exponents(scales).repeat_interleave(32, -1))


def unpacked(words: Tensor, bits: int, axis: int) -> Tensor:
    """Numbers of so many bits from 32-bit words, the lowest bits first, along an axis: int32."""
    shifts = torch.arange(0, 32, bits, dtype=torch.int32, device=words.device)
    parts = (words.unsqueeze(-1) >> shifts) & (2**bits - 1)
    return parts.flatten(-2) if axis in (-1, words.dim() - 1) else parts.movedim(-1, axis + 1).flatten(axis, axis + 1)


def gptq(words: Tensor, zeros: Tensor, scales: Tensor, group: Tensor, bits: int, zero_is_less_one: bool) -> Elements:
    """[out, in]. words: [in / n, out]; zeros: [groups, out / n]; scales: [groups, out]; group: of each input, its number."""
    zero = unpacked(zeros, bits, 1) + int(zero_is_less_one)
    index = group.long()
    codes = unpacked(words, bits, 0).to(torch.uint8)
    return Elements(f"unsigned {bits}", codes, scales.float()[index], zero[index]).transposed


def awq(words: Tensor, zeros: Tensor, scales: Tensor) -> Elements:
    """[out, in]. words: [in, out / 8]; zeros: [groups, out / 8]; scales: [groups, out]."""
    codes, zero = (_columns(each) for each in (words, zeros))
    width = codes.shape[0] // zero.shape[0]
    scale, zero = (each.repeat_interleave(width, 0) for each in (scales.float(), zero))
    return Elements("unsigned 4", codes.to(torch.uint8), scale, zero).transposed


def _columns(words: Tensor) -> Tensor:
    nibbles_of_words = unpacked(words, 4, 1).unflatten(1, (-1, 8))
    return nibbles_of_words[..., list(AWQ_ORDER)].flatten(1)
