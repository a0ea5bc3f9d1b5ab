"""FlexAttention: its relation, its blocks, and by its eager operator its values and gradients, against the dense mask.

No GPU ran here: the operator is torch's unfused one, with its refusal to train on a CPU put out of the way; what torch.compile
would build is counted, not built.
"""

from __future__ import annotations

from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
from torch._dynamo.testing import CompileCounter
from torch.nn.attention import flex_attention as flex_of_torch

from packs import HEADS, PACKS, numbers_of, values_and_gradients
from posttrain.batch import Segment
from posttrain.models.kernels import flex
from posttrain.models.kernels.flex import BLOCK, block_mask, flex_mask_mod, host_blocks
from posttrain.models.kernels.masks import DocumentMask, dense_mask

CPU = torch.device("cpu")
SINKS = torch.linspace(-1.0, 2.0, HEADS)


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flex_of_torch, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex, "compiled", lambda: flex_of_torch.flex_attention)


@pytest.mark.parametrize("window", [None, 1, 4, 7])
@pytest.mark.parametrize("memory", [0, 3])
def test_flex_mask_is_the_dense_mask(window: int | None, memory: int) -> None:
    segments = PACKS["group"]
    n = segments[-1].stop
    mod = flex_mask_mod(segments, window, CPU, memory)
    query, column = torch.meshgrid(torch.arange(n), torch.arange(memory + n), indexing="ij")
    zero = torch.zeros_like(query)
    assert torch.equal(mod(zero, zero, query, column), dense_mask(segments, n, window, memory))


@pytest.mark.parametrize("pack", PACKS)
def test_blocks_from_the_host_are_those_of_the_dense_mask(pack: str) -> None:
    """Those with a score that counts are there; those called whole are; where a segment fills a block, it is called whole."""
    length = PACKS[pack][-1].stop
    rows = -(-length // BLOCK) * BLOCK
    segments = PACKS[pack] + ((Segment(length, rows),) if rows > length else ())
    for memory, window in product((0, 5, 130), (None, 1, 40, 127, 128, 200)):
        columns = -(-(memory + rows) // BLOCK) * BLOCK
        dense = torch.zeros(rows, columns, dtype=torch.bool)
        dense[:, : memory + rows] = dense_mask(segments, rows, window, memory)
        counts = dense.view(rows // BLOCK, BLOCK, columns // BLOCK, BLOCK).sum((1, 3)).numpy()
        some, whole = host_blocks(segments, rows, columns, window, memory)
        assert ((some | whole) == (counts > 0)).all() and not (some & whole).any()
        assert (counts[whole] == BLOCK * BLOCK).all()
        if not memory:
            assert (whole == (counts == BLOCK * BLOCK)).all()


def test_blocks_by_hand() -> None:
    """Documents of 130 and 140 tokens, and one of 512."""
    short = block_mask(DocumentMask((Segment(0, 130), Segment(130, 270)), 270, CPU), None)
    assert short.seq_lengths == (384, 384) and short.to_dense()[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    some, whole = host_blocks((Segment(0, 512),), 512, 512, None, 0)
    assert some.astype(int).tolist() == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert whole.astype(int).tolist() == [[0, 0, 0, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]


@pytest.mark.parametrize(("softcap", "sinks"), [(None, None), (0.7, None), (None, SINKS), (0.7, SINKS)])
@pytest.mark.parametrize("pack", ["whole blocks", "shared"])
def test_values_and_gradients_are_those_of_the_dense_mask(pack: str, softcap: float | None, sinks: Any, eager: None) -> None:
    for memory, window in ((0, None), (3, 6)):
        options = {"sliding_window": window, "softcap": softcap, "s_aux": sinks}
        want = values_and_gradients("dense", pack, memory, torch.float32, **options)
        got = values_and_gradients("flex", pack, memory, torch.float32, **options)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=2e-5)


def test_blocks_and_relation_are_made_once_a_pack_and_window(eager: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once a layer: 6 layers with two windows make two block masks of one relation."""
    made: list[str] = []
    relation = flex._Relation
    monkeypatch.setattr(flex, "host_blocks", lambda *given: made.append("blocks") or host_blocks(*given))
    monkeypatch.setattr(flex, "_Relation", lambda *given: made.append("relation") or relation(*given))
    numbers, mask = numbers_of("shared", dtype=torch.float32)
    for window in (None, 5, 5, None, 5, None):
        flex.by_flex(*numbers, mask=mask, scaling=None, window=window, softcap=None, sinks=None)
    assert sorted(made) == ["blocks", "blocks", "relation"]


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in the layer that makes the blocks either: on a device of shapes alone any look at a number is an error."""
    monkeypatch.setattr(flex, "compiled", lambda: lambda query, key, value, **options: query + key.sum() + value.sum())
    numbers, mask = numbers_of("shared", dtype=torch.float32)
    numbers = [x.detach().to("meta").requires_grad_() for x in numbers]
    elsewhere = DocumentMask(mask.segments, mask.num_tokens, torch.device("meta"))
    for window in (None, 5, None):
        flex.by_flex(*numbers, mask=elsewhere, scaling=None, window=window, softcap=None, sinks=None).sum().backward()
    assert all(x.grad is not None and x.grad.shape == x.shape for x in numbers)


def test_two_variants_are_compiled_in_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of every length, window and number of documents: one with gradients, one without."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex_of_torch, "_validate_device", lambda *_: None)
    counter = CompileCounter()
    compiled = torch.compile(flex_of_torch.flex_attention, backend=counter, dynamic=True)
    monkeypatch.setattr(flex, "compiled", lambda: compiled)
    for trains in (True, False):
        for pack in ("one", "shared", "whole blocks"):
            for window in (None, 5):
                with torch.set_grad_enabled(trains):
                    numbers, mask = numbers_of(pack, dtype=torch.float32)
                    flex.by_flex(*numbers, mask=mask, scaling=0.3, window=window, softcap=None, sinks=None)
    assert counter.frame_count == 2


def test_more_models_in_a_process_than_torch_compiles_for_are_compiled_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten numbers of heads; torch's own limit is eight, and beyond it all scores would be written out."""
    torch._dynamo.reset()
    monkeypatch.setattr(flex_of_torch, "_validate_device", lambda *_: None)
    counter = CompileCounter()
    monkeypatch.setattr(flex.torch, "compile", partial(torch.compile, backend=counter))
    flex.compiled.cache_clear()
    with torch._dynamo.config.patch(recompile_limit=8), torch.no_grad():
        for heads in range(1, 11):
            mask = DocumentMask((Segment(0, 20),), 20, CPU)
            numbers = [torch.randn(1, heads, 20, 16) for _ in range(3)]
            flex.by_flex(*numbers, mask=mask, scaling=0.3, window=None, softcap=None, sinks=None)
    flex.compiled.cache_clear()
    torch._dynamo.reset()
    assert counter.frame_count == 10
