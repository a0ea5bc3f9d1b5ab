from __future__ import annotations

import math
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, LagunaConfig, PreTrainedConfig, RecurrentGemmaConfig, xLSTMConfig

from posttrain.models.kernels.logprobs import (
    Head,
    head_bytes,
    head_of,
    plain_logprobs,
    token_entropies,
    token_logprobs,
    token_spread,
)

N, H, V = 11, 6, 17


def case(scale: float, softcap: float | None, trained: bool) -> tuple[Tensor, Tensor, Head, Tensor]:
    torch.manual_seed(0)
    hidden = torch.randn(N, H, requires_grad=True)
    weight, bias = torch.randn(V, H, requires_grad=trained), torch.randn(V, requires_grad=trained)
    return hidden, torch.randint(V, (N,)), Head(weight, bias, scale, softcap), torch.randn(N)


def plain(hidden: Tensor, target: Tensor, head: Head) -> Tensor:
    logits = (hidden @ head.weight.T + (0 if head.bias is None else head.bias)) * head.scale
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return logits.log_softmax(-1)[torch.arange(N), target]


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (1.0, 2.0), (3.0, 2.0)])
@pytest.mark.parametrize(("rows", "words"), [(1, 1), (4, 5), (11, 17), (100, 100)])
def test_logprobs_and_gradients_are_those_of_log_softmax(
    scale: float, softcap: float | None, trained: bool, rows: int, words: int
) -> None:
    hidden, target, head, chooses = case(scale, softcap, trained)
    leaves = [hidden, head.weight, head.bias] if trained else [hidden]
    want = plain(hidden, target, head)
    wanted = torch.autograd.grad((want * chooses).sum(), leaves)
    got = token_logprobs(hidden, target, head, rows, words)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    for have, need in zip(torch.autograd.grad((got * chooses).sum(), leaves), wanted, strict=True):
        torch.testing.assert_close(have, need, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (3.0, 2.0)])
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_the_plain_reference_is_log_softmax_and_goes_in_chunks(
    scale: float, softcap: float | None, trained: bool, rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("posttrain.models.kernels.logprobs.chunk_logits", lambda device: rows * V)
    hidden, target, head, chooses = case(scale, softcap, trained)
    leaves = [hidden, head.weight, head.bias] if trained else [hidden]
    want, got = plain(hidden, target, head), plain_logprobs(hidden, target, head)
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    pairs = zip(*(torch.autograd.grad((x * chooses).sum(), leaves) for x in (got, want)), strict=True)
    for have, need in pairs:
        torch.testing.assert_close(have, need, rtol=1e-6, atol=2e-6)
    assert plain_logprobs(hidden[:0], target[:0], head).shape == (0,)


def test_frozen_head_keeps_no_logits_for_the_backward() -> None:
    hidden, target, head, _ = case(1.0, None, False)
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        token_logprobs(hidden, target, head, 4, 5).sum().backward()
    assert kept == [(N, H)]


def test_no_predictions_give_no_gradient() -> None:
    hidden, target, head, _ = case(1.0, None, False)
    token_logprobs(hidden[:0], target[:0], head).sum().backward()
    assert hidden.grad is not None and not hidden.grad.any()


def test_half_precision_gives_float32_logprobs() -> None:
    hidden, target, head, _ = case(1.0, None, False)
    assert head.bias is not None
    half = head._replace(weight=head.weight.bfloat16(), bias=head.bias.bfloat16())
    got = token_logprobs(hidden.bfloat16(), target, half)
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, plain(hidden, target, head), rtol=0, atol=0.1)


def test_gradient_of_a_sure_model_survives_half_precision() -> None:
    """log p is -1e-3 and less: the gradient is (1 - p) times something, and 1 - p must not drown in bfloat16's rounding of p."""
    torch.manual_seed(0)
    target, hidden = torch.arange(V), torch.zeros(V, V)
    hidden[target, target] = 10.0
    weight = torch.eye(V) + 0.01 * torch.randn(V, V)
    halves = [t.bfloat16() for t in (hidden, weight)]
    exact = [t.double() for t in halves]
    leaf = exact[0].requires_grad_()
    want = (leaf @ exact[1].T).log_softmax(-1)[target, target]
    assert want.min() > -2e-3
    got = token_logprobs(halves[0].requires_grad_(), target, Head(halves[1], None, 1.0, None), 8, 5)
    torch.testing.assert_close(got, want.float(), rtol=0.01, atol=0)
    (have,) = torch.autograd.grad(got.sum(), halves[0])
    (need,) = torch.autograd.grad(want.sum(), leaf)
    assert (have.double() - need).norm() < 0.02 * need.norm()


def test_entropy_by_hand() -> None:
    """Chances 1/2, 1/4, 1/4 have an entropy of 1.5 bits, four equal ones of 2; of the sure one it is nearly 0."""
    logits = torch.tensor([[0.5, 0.25, 0.25, 1e-30], [0.25] * 4, [1.0, 1e-12, 1e-12, 1e-12]]).log().requires_grad_()
    found = token_entropies(logits, Head(torch.eye(4), None, 1.0, None))
    assert found.tolist() == pytest.approx([1.5 * math.log(2), 2 * math.log(2), 0.0], abs=1e-6)
    # dH / d logit_i = -p_i (log p_i + H)
    (have,) = torch.autograd.grad(found[0], logits)
    log2 = math.log(2)
    assert have[0].tolist() == pytest.approx(
        [-0.5 * (-log2 + 1.5 * log2), *[-0.25 * (-2 * log2 + 1.5 * log2)] * 2, 0.0], abs=1e-6
    )


@pytest.mark.parametrize("softcap", [None, 2.0])
def test_a_temperature_divides_the_logits(softcap: float | None) -> None:
    hidden, target, head, _ = case(0.5, softcap, False)
    logits = head.logits(hidden) / 0.7
    want = logits.log_softmax(-1)[torch.arange(N), target]
    torch.testing.assert_close(token_logprobs(hidden, target, head.at(0.7), 4, 5), want, rtol=0, atol=1e-6)
    entropies = -(logits.softmax(-1) * logits.log_softmax(-1)).sum(-1)
    torch.testing.assert_close(token_entropies(hidden, head.at(0.7)), entropies, rtol=0, atol=1e-6)
    assert (want - token_logprobs(hidden, target, head, 4, 5)).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("config", "softcap"),
    [
        (RecurrentGemmaConfig(logits_soft_cap=7.0), 7.0),
        (Gemma2Config(final_logit_softcapping=5.0, attn_logit_softcapping=3.0), 5.0),
        (Gemma2Config(final_logit_softcapping=None, attn_logit_softcapping=3.0), None),
        (xLSTMConfig(output_logit_soft_cap=9.0, gate_soft_cap=3.0), 9.0),
        (LagunaConfig(moe_router_logit_softcapping=3.0), None),
    ],
)
def test_a_heads_cap_is_known_by_every_name_for_it(config: PreTrainedConfig, softcap: float | None) -> None:
    """And caps of attention's scores, gates and routers are none."""
    assert head_of(nn.Linear(2, 3), config).softcap == softcap


class Peak(TorchDispatchMode):
    """The most bytes that are alive at a time of all that is made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, int] = {}
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {each.untyped_storage()._cdata for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and (key := tensor.untyped_storage()._cdata) not in {*self.alive, *given}:
                self.alive[key] = tensor.untyped_storage().nbytes()
                weakref.finalize(tensor.untyped_storage(), self.alive.pop, key, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return out


@pytest.mark.parametrize(("tokens", "dtype"), [(96, torch.bfloat16), (512, torch.bfloat16), (96, torch.float32)])
@pytest.mark.parametrize("trained", [False, True])
def test_the_heads_memory_is_what_it_is(tokens: int, dtype: torch.dtype, trained: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where there are fewer tokens than a tile has rows."""
    monkeypatch.setattr("posttrain.models.kernels.logprobs.block", lambda device: (256, 512))
    vocabulary, width = 2048, 64
    head = Head(torch.randn(vocabulary, width, dtype=dtype, requires_grad=trained), None, 1.0, None)
    body = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    with Peak() as seen:
        hidden = body * 1
        token_logprobs(hidden[torch.arange(tokens)], torch.randint(vocabulary, (tokens,)), head).sum().backward()
    counted = head_bytes(head.weight, tokens, "cpu")
    assert counted == pytest.approx(seen.peak, rel=0.04)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize(("scale", "softcap"), [(1.0, None), (0.5, None), (3.0, 2.0)])
def test_the_spread_is_that_of_all_logits(scale: float, softcap: float | None, trained: bool) -> None:
    """Mean log-prob of all words and log Z, with their gradients: what label smoothing and z-loss are made of."""
    hidden, target, head, chooses = case(scale, softcap, trained)
    leaves = [hidden, head.weight, head.bias] if trained else [hidden]
    assert head.bias is not None
    logits = (hidden @ head.weight.T + head.bias) * head.scale
    logits = head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
    wanted = torch.stack([logits.log_softmax(-1).mean(-1), logits.logsumexp(-1)])
    got = token_spread(hidden, target, token_logprobs(hidden, target, head), head)
    torch.testing.assert_close(got, wanted, rtol=0, atol=2e-6)
    pairs = zip(*(torch.autograd.grad((x * chooses).sum(), leaves) for x in (got, wanted)), strict=True)
    for have, need in pairs:
        torch.testing.assert_close(have, need, rtol=1e-5, atol=5e-6)
