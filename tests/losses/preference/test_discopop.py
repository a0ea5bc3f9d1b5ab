"""DiscoPOP by hand, and its two halves."""

import math

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.discopop import LOSS, discopop

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # x = 2 and -1, tau 1: m = 0.880797 and 0.268941; softplus(-2) = 0.126928, softplus(1) = 1.313262
    first = 0.126928 * (1 - 0.880797) + math.exp(-2) * 0.880797
    second = 1.313262 * (1 - 0.268941) + math.exp(1) * 0.268941
    assert discopop(PAIRS, beta=1.0, tau=1.0).tolist() == pytest.approx([first, second], abs=1e-5)


def test_far_from_zero_it_is_the_logistic_loss_below_and_the_exponential_one_above() -> None:
    found = discopop(Pairs(torch.tensor([-2.0, 0, 2, 0]), torch.zeros(4), torch.ones(4)), beta=1.0, tau=0.05)
    assert found.tolist() == pytest.approx([math.log1p(math.exp(2)), math.exp(-2)], abs=1e-5)
    assert LOSS.options == {"tau": 0.05}
