"""The balance of experts is that of transformers, and has the values that can be worked out by hand."""

from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from posttrain.losses.router import router_balance


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_it_is_that_of_transformers(top_k: int, masked: bool) -> None:
    torch.manual_seed(0)
    layers = [torch.randn(4 * 7, 6, requires_grad=True) for _ in range(3)]
    mask = torch.ones(4, 7, dtype=torch.long)
    mask[1, 4:] = mask[3, 2:] = 0
    theirs = load_balancing_loss_func(tuple(layers), 6, top_k, mask if masked else None)  # pyright: ignore[reportArgumentType]
    assert isinstance(theirs, torch.Tensor)
    wanted = torch.autograd.grad(theirs, layers)
    loss, _ = router_balance([each[mask.flatten().bool()] if masked else each for each in layers], top_k)
    assert abs(loss.item() - theirs.item()) < 1e-6
    for ours, grad in zip(torch.autograd.grad(loss, layers), wanted, strict=True):
        torch.testing.assert_close(ours, grad, atol=1e-6, rtol=0)


def test_by_hand() -> None:
    alike = torch.eye(4)[torch.arange(8) % 4] * 50
    loss, load = router_balance([alike], 1)
    assert (loss.item(), load.item()) == pytest.approx((1, 1))
    one = torch.eye(4)[torch.zeros(8, dtype=torch.long)] * 50
    loss, load = router_balance([one], 1)
    assert (loss.item(), load.item()) == pytest.approx((4, 4))
    # the loss takes all layers' tokens together (f = P = 5/8, 1/8, 1/8, 1/8), the load each layer by itself
    loss, load = router_balance([alike, one], 1)
    assert (loss.item(), load.item()) == pytest.approx((4 * 28 / 64, 2.5))
