"""Token loss against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.config.choices import TOKEN_LOSSES
from posttrain.losses.tokens import answer_sums, shaped_token_loss, token_loss


def test_sum_of_weighted_negative_log_probs() -> None:
    # -(1 * ln .5 + 2 * ln .25) = ln 2 + 2 * 2 ln 2 = 5 ln 2; count 1 + 2
    logps = torch.tensor([0.5, 0.25]).log()
    output = token_loss(logps, torch.tensor([1.0, 2.0]))
    assert output.total.item() == pytest.approx(5 * math.log(2), abs=1e-6)
    total, count = output.metrics["loss"]
    assert total.item() / count == pytest.approx(5 * math.log(2) / 3, abs=1e-6)


def test_answer_sums_by_owner() -> None:
    sums = answer_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0]), 3)
    assert sums.tolist() == [9.0, 0.0, 6.0]


class Operations(TorchDispatchMode):
    """Which of torch's operations are run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.add(func.__name__)
        return func(*args, **kwargs or {})


def test_sums_of_answers_by_hand_and_in_one_order_off_the_cpu() -> None:
    """Both ways give the same. CUDA's index_add adds as its threads come, its index_put sorts first (simulated on shapes)."""
    values, owner = torch.tensor([1.0, 2.0, 4.0, 8.0, 16.0], requires_grad=True), torch.tensor([2, 0, 2, 3, 0])
    sums = answer_sums(values, owner, 5)
    assert sums.tolist() == [18.0, 0.0, 5.0, 8.0, 0.0]
    assert torch.equal(torch.zeros(5).index_put((owner,), values, accumulate=True), sums)
    sums.backward(torch.arange(5.0))
    assert values.grad is not None and values.grad.tolist() == [2.0, 0.0, 2.0, 3.0, 0.0]
    with Operations() as run:
        assert answer_sums(values.detach().to("meta"), owner.to("meta"), 5).shape == (5,)
    assert "index_put.default" in run.names and not any("index_add" in name or "scatter" in name for name in run.names)


def test_dft_by_hand_and_its_gradient_is_that_of_the_chance() -> None:
    """-p log p: of .5 it is .3466, of .25 .3466 too. d/dl of it is -p, of the plain loss -1."""
    logps = torch.tensor([0.5, 0.25]).log().requires_grad_()
    output = shaped_token_loss(TOKEN_LOSSES.get("dft"), logps, torch.tensor([1.0, 2.0]))
    assert output.total.item() == pytest.approx(0.5 * math.log(2) + 2 * 0.25 * 2 * math.log(2), abs=1e-6)
    (gradient,) = torch.autograd.grad(output.total, logps)
    assert gradient.tolist() == pytest.approx([-0.5, -2 * 0.25])
    assert float(output.metrics["nll"][0]) == pytest.approx(5 * math.log(2), abs=1e-6)  # the plain one stands beside it


def test_smoothing_and_z_loss_by_hand() -> None:
    """(1 - .1) ln 2 + .1 * 3 + .5 * 2^2, of weight 2."""
    spread = torch.tensor([[-3.0], [2.0]])
    output = shaped_token_loss(TOKEN_LOSSES.get("nll"), torch.tensor([0.5]).log(), torch.tensor([2.0]), 0.1, 0.5, spread)
    assert output.total.item() == pytest.approx(2 * (0.9 * math.log(2) + 0.3 + 2.0), abs=1e-6)


def test_without_anything_it_is_the_plain_loss_to_the_bit() -> None:
    logps, weight = torch.randn(9).sub(3).requires_grad_(), torch.rand(9)
    shaped = shaped_token_loss(TOKEN_LOSSES.get("nll"), logps, weight)
    assert torch.equal(shaped.total, token_loss(logps, weight).total)
