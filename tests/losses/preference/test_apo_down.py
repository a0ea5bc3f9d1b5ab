"""APO-down by hand, and which way it pulls at the start."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.apo_down import LOSS, apo_down

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # sigma(1) = 0.731059, sigma(2) = 0.880797, sigma(-1) = 0.268941
    assert apo_down(PAIRS, beta=1.0).tolist() == pytest.approx([0.731059 + 1 - 0.880797, 0.5 + 1 - 0.268941], abs=1e-5)


def test_at_the_start_it_is_one_and_lowers_the_rejected_answer_alone_then_both() -> None:
    policy = torch.zeros(2, requires_grad=True)
    loss = apo_down(Pairs(policy, torch.zeros(2), torch.ones(2)), beta=0.4)
    loss.sum().backward()
    assert policy.grad is not None and loss.tolist() == [1.0]
    assert policy.grad.tolist() == pytest.approx([0.0, 0.1])
    apart = torch.tensor([0.0, -50.0], requires_grad=True)  # a pair that is told apart: the chosen one goes down too
    apo_down(Pairs(apart, torch.zeros(2), torch.ones(2)), beta=0.4).sum().backward()
    assert apart.grad is not None and float(apart.grad[0]) == pytest.approx(0.1, abs=1e-6) and LOSS.needs_reference
