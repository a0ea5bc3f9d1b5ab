"""SLiC's hinge by hand, and where it stops to teach."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.hinge import LOSS, hinge

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    assert hinge(PAIRS, beta=0.25).tolist() == pytest.approx([1 - 0.25 * 2, 1 + 0.25 * 1], abs=1e-6)


def test_a_pair_beyond_the_margin_teaches_nothing() -> None:
    policy = torch.tensor([5.0, 0.0, 3.0, 0.0], requires_grad=True)  # margins 5 and 3; 1 / beta is 4
    loss = hinge(Pairs(policy, torch.zeros(4), torch.ones(4)), beta=0.25)
    loss.sum().backward()
    assert loss.tolist() == [0.0, 0.25] and policy.grad is not None
    assert policy.grad.tolist() == [0.0, 0.0, -0.25, 0.25]
    assert LOSS.needs_reference and not LOSS.smooths_labels and not LOSS.options
