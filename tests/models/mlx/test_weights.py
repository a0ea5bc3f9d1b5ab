"""MLX's codes: by hand, and as MLX itself makes and reads them."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from posttrain.errors import UserError
from posttrain.models.mlx.weights import dequantize, quantize, require_quantizable


def test_by_hand() -> None:
    row = torch.arange(64).float()[None] / 63 * 15 - 8  # -8 to 7: sixteen steps of one
    codes, scale, bias = quantize(row, 4)
    assert scale.tolist() == [[1.0]] and bias.tolist() == [[-8.0]] and codes.shape == (1, 8) and codes.dtype == torch.uint32
    first = [int(codes[0, 0]) >> (4 * i) & 15 for i in range(8)]
    assert first == [round(i / 63 * 15) for i in range(8)]
    torch.testing.assert_close(dequantize(codes, scale, bias), row.round(), rtol=0, atol=0)
    zero = quantize(torch.zeros(2, 128), 8)
    assert zero[0].shape == (2, 32) and not dequantize(*zero).any()


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_are_near(bits: int) -> None:
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(0))
    back = dequantize(*quantize(weight, bits))
    spread = weight.unflatten(-1, (3, 64)).amax(-1) - weight.unflatten(-1, (3, 64)).amin(-1)
    assert ((back - weight).abs().unflatten(-1, (3, 64)).amax(-1) <= spread / (2**bits - 1) * 1.001).all()


@pytest.mark.parametrize("bits", [4, 8])
def test_mlx_makes_and_reads_the_same(bits: int) -> None:
    mx: Any = pytest.importorskip("mlx.core", reason="mlx is not installed")
    weight = torch.randn(16, 192, generator=torch.Generator().manual_seed(1))
    codes, scale, bias = quantize(weight, bits)
    theirs = [torch.tensor(each.tolist()) for each in mx.quantize(mx.array(weight.tolist()), 64, bits)]
    torch.testing.assert_close(theirs[1], scale, rtol=1e-6, atol=0)
    torch.testing.assert_close(theirs[2], bias, rtol=1e-6, atol=0)
    assert (theirs[0] == codes.long()).float().mean() > 0.99  # a tie may be rounded otherwise
    back = mx.dequantize(
        mx.array(codes.long().tolist(), dtype=mx.uint32), *(mx.array(x.tolist()) for x in (scale, bias)), 64, bits
    )
    torch.testing.assert_close(torch.tensor(back.tolist()), dequantize(codes, scale, bias), rtol=0, atol=1e-6)


def test_other_families_are_refused() -> None:
    with pytest.raises(UserError, match="no gpt2 model is quantized for MLX here"):
        require_quantizable(type("Config", (), {"model_type": "gpt2"}))
