"""ORPO by hand, and the limits of its odds."""

import math

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.orpo import LOSS, orpo

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # mean log-probs -5 and -3: log odds -4.993239 and -2.948930
    odds = [math.log(math.exp(mean) / (1 - math.exp(mean))) for mean in (-5.0, -3.0)]
    expected = 5 + 0.2 * math.log1p(math.exp(-(odds[0] - odds[1])))
    assert float(orpo(PAIRS, beta=0.2)[0]) == pytest.approx(expected, abs=1e-5)


def test_answers_that_are_certain_have_a_loss_that_is_finite_and_of_unlikely_ones_odds_are_probs() -> None:
    sure = orpo(Pairs(torch.tensor([0.0, 0.0]), None, torch.ones(2)), beta=1.0)
    assert sure.tolist() == pytest.approx([math.log(2)], abs=1e-6)
    rare = Pairs(torch.tensor([-30.0, -31.0]), None, torch.ones(2))
    assert float(orpo(rare, beta=1.0)) == pytest.approx(30 + math.log1p(math.exp(-1)), abs=1e-5)
    assert not LOSS.needs_reference and LOSS.per_token and LOSS.beta == 0.1
