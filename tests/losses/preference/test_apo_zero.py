"""APO-zero by hand, and which way it pulls at the start."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.apo_zero import LOSS, apo_zero

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # sigma(1) = 0.731059, sigma(0) = 0.5
    assert apo_zero(PAIRS, beta=1.0).tolist() == pytest.approx([2 * (1 - 0.731059), 0.5 + 0.731059], abs=1e-5)


def test_at_the_start_it_is_one_and_raises_the_chosen_answer_and_lowers_the_other() -> None:
    policy = torch.zeros(2, requires_grad=True)
    loss = apo_zero(Pairs(policy, torch.zeros(2), torch.ones(2)), beta=0.4)
    loss.sum().backward()
    assert policy.grad is not None and loss.tolist() == [1.0]
    assert policy.grad.tolist() == pytest.approx([-0.1, 0.1]) and LOSS.needs_reference
