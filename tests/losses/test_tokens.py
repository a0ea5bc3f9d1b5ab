"""Token loss against numbers worked out by hand."""

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from posttrain.losses.tokens import answer_sums, token_loss


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
