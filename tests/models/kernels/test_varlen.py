"""The arguments of varlen attention, put through its documented semantics written plainly, give what the dense mask gives.

No GPU ran here: the kernel itself is not called, its arguments are.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from packs import PACKS, numbers_of, plain_varlen, values_and_gradients
from posttrain.batch import Segment
from posttrain.models.kernels import attention, varlen
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.kernels.varlen import stretches

CPU = torch.device("cpu")


@pytest.mark.parametrize("memory", [0, 3])
@pytest.mark.parametrize("pack", PACKS)
def test_values_and_gradients_are_those_of_the_dense_mask(pack: str, memory: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(attention, "HALF", (torch.float64,))
    for window in (None, 1, 6, 140, 1000):
        want = values_and_gradients("dense", pack, memory, sliding_window=window)
        got = values_and_gradients("varlen", pack, memory, sliding_window=window)
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=2e-6)  # the dense way's softmax is in float32


def test_torch_2_11_takes_fewer_heads_of_keys_without_being_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its function knows no enable_gqa; the numbers are the same."""

    def earlier(*given: Any, scale: float | None = None, window_size: tuple[int, int] = (-1, -1)) -> torch.Tensor:
        return plain_varlen(*given, scale=scale, window_size=window_size, enable_gqa=True)

    numbers, mask = numbers_of("shared")
    found = []
    for function in (plain_varlen, earlier):
        monkeypatch.setattr(varlen, "varlen_attn", function)
        found.append(varlen.by_varlen(*numbers, mask=mask, scaling=None, window=None))
    assert numbers[0].shape[1] != numbers[1].shape[1] and torch.equal(*found)


def test_arguments_by_hand() -> None:
    """A document of 2, a prompt of 2 with answers of 1 and 2, and two keys of memory."""
    segments = (Segment(0, 2), Segment(2, 4), Segment(4, 5, 2, 4), Segment(5, 7, 2, 4))
    found = stretches(segments, 2, CPU)
    assert found.of_queries.tolist() == [0, 2, 4, 5, 7] and found.most_queries == 2
    assert found.of_keys.tolist() == [0, 4, 8, 13, 19] and found.most_keys == 6
    assert found.gather is not None
    rows = [[0, 1, 2, 3], [0, 1, 4, 5], [0, 1, 4, 5, 6], [0, 1, 4, 5, 7, 8]]
    assert found.gather.rows.tolist() == [row for each in rows for row in each]
    uses = {key: places for keys, some in found.gather.uses for key, places in zip(keys.tolist(), some.tolist(), strict=True)}
    assert uses[0] == [0, 4, 8, 13] and uses[4] == [6, 10, 15] and uses[8] == [18] and sorted(uses) == list(range(9))


def test_documents_alone_are_read_as_they_lie() -> None:
    found = stretches((Segment(0, 3), Segment(3, 8)), 0, CPU)
    assert found.gather is None and found.of_keys.tolist() == found.of_queries.tolist() == [0, 3, 8]


def test_a_window_counts_the_token_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """A window of w reaches w - 1 back; one that no document fills is plain causal attention, for which there is a kernel."""
    asked = []
    monkeypatch.setattr(varlen, "varlen_attn", lambda *given, **options: asked.append(options["window_size"]) or given[0])
    numbers, mask = numbers_of("shared")
    for window in (None, 5, 281, 282):
        varlen.by_varlen(*numbers, mask=mask, scaling=None, window=window)
    assert asked == [(-1, 0), (4, 0), (-1, 0), (-1, 0)] and stretches(PACKS["shared"], 0, CPU).most_keys == 281


def test_the_layout_is_made_once_a_pack(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Any] = []
    monkeypatch.setattr(varlen, "varlen_attn", plain_varlen)
    monkeypatch.setattr(varlen, "stretches", lambda *given: made.append(given) or stretches(*given))
    numbers, mask = numbers_of("shared")
    for window in (None, 5, None, 7):
        varlen.by_varlen(*numbers, mask=mask, scaling=None, window=window)
    assert len(made) == 1


def test_the_host_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where the layout is made, nor in the backward: on a device of shapes alone any look at a number is an error."""
    monkeypatch.setattr(varlen, "varlen_attn", lambda query, key, value, *_, **options: query + key.sum() + value.sum())
    for pack in ("documents", "shared", "group"):
        numbers, mask = numbers_of(pack)
        numbers = [x.detach().to("meta").requires_grad_() for x in numbers]
        elsewhere = DocumentMask(mask.segments, mask.num_tokens, torch.device("meta"))
        for window in (None, 5):
            varlen.by_varlen(*numbers, mask=elsewhere, scaling=None, window=window).sum().backward()
        assert all(x.grad is not None and x.grad.shape == x.shape for x in numbers)


def test_shared_keys_gradients_are_added_up_in_float32() -> None:
    """256 answers that each give a prompt's key 1 + 2^-7: in bfloat16, one after the other, they stop growing at 256."""
    segments = (Segment(0, 1), *(Segment(1 + i, 2 + i, 0, 1) for i in range(255)))
    gather = stretches(segments, 0, CPU).gather
    assert gather is not None
    key = torch.zeros(256, 1, 1, dtype=torch.bfloat16, requires_grad=True)
    varlen._Gathered.apply(key, gather).backward(torch.full((len(gather.rows), 1, 1), 1.5, dtype=torch.bfloat16))  # pyright: ignore
    assert key.grad is not None and float(key.grad[0]) == 384.0 and set(key.grad[1:].flatten().tolist()) == {1.5}


def test_a_call_in_float32_goes_by_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(varlen, "varlen_attn", lambda *_: pytest.fail("a kernel of 16 bits"))
    want, got = (values_and_gradients(how, "shared", 0, torch.float32)[0] for how in ("documents", "varlen"))
    assert torch.equal(got, want)
