"""SimPO by hand, and what gamma and lengths do."""

import math

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.simpo import LOSS, simpo

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # mean log-probs -5, -3 and -1, -2: beta h - gamma = -2 - 0.5 and 1 - 0.5
    found = simpo(PAIRS, beta=1.0, label_smoothing=0.0, gamma=0.5).tolist()
    assert found == pytest.approx([math.log1p(math.exp(2.5)), math.log1p(math.exp(-0.5))], abs=1e-5)


def test_a_win_by_gamma_alone_is_a_coin_toss_and_an_answer_repeated_changes_nothing() -> None:
    pairs = Pairs(torch.tensor([-2.0, -3.0]), None, torch.tensor([2.0, 2.0]))  # h = 0.5
    longer = Pairs(torch.tensor([-20.0, -3.0]), None, torch.tensor([20.0, 2.0]))
    for each in (pairs, longer):
        assert float(simpo(each, beta=2.0, label_smoothing=0.0, gamma=1.0)) == pytest.approx(math.log(2), abs=1e-6)
    assert not LOSS.needs_reference and LOSS.beta == 2.0 and LOSS.options == {"gamma": 1.0}
