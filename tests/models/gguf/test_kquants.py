"""K-quants: the gguf package's own reader gives back what was written, as near as its bits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader
from tests.models.gguf.test_gguf import IDS, made, written

from posttrain.models.gguf.kquants import KINDS, quantize_k
from posttrain.models.gguf.read import load_gguf

NOISE = torch.rand(2, 256, generator=torch.Generator().manual_seed(0))
BYTES = {Kind.Q4_K: 144, Kind.Q5_K: 176, Kind.Q6_K: 210}


def read(values: torch.Tensor, kind: Kind) -> torch.Tensor:
    coded = quantize_k(values, kind)
    assert coded.dtype == np.uint8 and coded.shape == (*values.shape[:-1], values.shape[-1] // 256 * BYTES[kind])
    return torch.from_numpy(gguf.dequantize(coded, kind))


@pytest.mark.parametrize("kind", KINDS)
def test_what_such_a_file_can_hold_is_held_exactly(kind: Kind) -> None:
    """Codes that use their whole range in each small block, with scales that are whole parts of one power of two."""
    generator = torch.Generator().manual_seed(0)
    top, small = {Kind.Q4_K: (15, 32), Kind.Q5_K: (31, 32), Kind.Q6_K: (63, 16)}[kind]
    code = torch.randint(0, top + 1, (3, 256 // small, small), generator=generator)
    code[..., 0], code[..., 1] = 0, top
    if kind == Kind.Q6_K:
        values = (code - 32.0) * torch.tensor([-128.0, *range(1, 16)])[:, None] * 2**-9
    else:
        values = code * torch.arange(56, 64)[:, None] * 2**-9 - torch.arange(63, 55, -1)[:, None] * 2**-7
    values = values.reshape(3, 256)
    torch.testing.assert_close(read(values, kind), values, rtol=0, atol=2e-6)


def test_more_bits_are_nearer_and_k_quants_nearer_than_plain_ones() -> None:
    values = torch.randn(64, 512, generator=torch.Generator().manual_seed(0)) * 0.02

    def far(back: Any) -> float:
        return float(np.linalg.norm(back - values.numpy())) / float(values.norm())

    ours = [far(read(values, kind).numpy()) for kind in (Kind.Q4_K, Kind.Q5_K, Kind.Q6_K)]
    plain = [far(gguf.dequantize(gguf.quants.quantize(values.numpy(), kind), kind)) for kind in (Kind.Q4_0, Kind.Q5_0)]
    assert 0.06 < ours[0] < 0.075 < plain[0] and 0.03 < ours[1] < 0.038 < plain[1] and 0.015 < ours[2] < 0.02


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("values", [torch.zeros(2, 256), torch.full((2, 256), 0.3), torch.full((2, 256), -4.0), -NOISE])
def test_odd_blocks_are_numbers_and_near(kind: Kind, values: torch.Tensor) -> None:
    back = read(values, kind)
    assert torch.isfinite(back).all() and float((back - values).abs().max()) <= 0.05 * float(values.abs().max())


def test_a_file_of_mixed_kinds_is_near_the_model(tmp_path: Path) -> None:
    """Of 8 layers the first, the last and each third between keep values and the way down in six bits; so do the ends."""
    wide = {"hidden_size": 256, "intermediate_size": 320, "num_hidden_layers": 8}
    model = made(tmp_path, "llama", **wide)
    file = written(tmp_path, model, "q4_k_m")
    kinds = {t.name: t.tensor_type.name for t in GGUFReader(file).tensors}
    six = [i for i in range(8) if kinds[f"blk.{i}.attn_v.weight"] == "Q6_K"]
    assert six == [0, 3, 6, 7] and kinds["blk.1.attn_v.weight"] == kinds["blk.0.attn_q.weight"] == "Q4_K"
    assert kinds["token_embd.weight"] == kinds["output.weight"] == "Q6_K" and kinds["blk.0.attn_norm.weight"] == "F32"
    assert (kinds["blk.0.ffn_down.weight"], kinds["blk.1.ffn_down.weight"]) == ("Q8_0", "Q5_0")  # rows of 320 fill no 256
    with torch.no_grad():
        want, found = model(IDS).logits.log_softmax(-1), load_gguf(file, model.config)(IDS).logits.log_softmax(-1)
    assert 0 < float((want.exp() * (want - found)).sum(-1).mean()) < 1e-2


def test_rows_that_fill_no_blocks_are_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, made(tmp_path, "llama", hidden_size=80, num_attention_heads=4), "q6_k")
    said = capsys.readouterr()
    assert "matrices, such as output.weight, are kept in f16: their rows do not fill blocks of q6_k" in said.out + said.err
