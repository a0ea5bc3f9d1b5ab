"""EXO's reverse KL by hand, where it is zero, and that a share of 0 is refused."""

import math

import pytest
import torch

from posttrain.errors import UserError
from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss
from posttrain.losses.preference.exo_pair import LOSS, exo_pair

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    q = 1 / (1 + math.exp(-0.5 * 2))
    kl = q * math.log(q / 0.9) + (1 - q) * math.log((1 - q) / 0.1)
    assert float(exo_pair(PAIRS, beta=0.5, label_smoothing=0.1)[0]) == pytest.approx(kl, abs=1e-6)


def test_it_is_zero_where_the_model_agrees_with_the_labels_and_positive_elsewhere() -> None:
    for off in (-1.0, 0.0, 1.0):
        margin = math.log(0.9 / 0.1) / 0.5 + off
        pairs = Pairs(torch.tensor([margin, 0.0]), torch.zeros(2), torch.ones(2))
        found = float(exo_pair(pairs, beta=0.5, label_smoothing=0.1))
        assert found == pytest.approx(0, abs=1e-6) if not off else found > 1e-3


def test_a_share_of_zero_is_refused_where_it_would_be_infinite() -> None:
    with pytest.raises(
        UserError, match=r"^dpo.label_smoothing: dpo.loss=exo_pair is infinite at 0; leave it out for the usual one$"
    ):
        chosen_loss("exo_pair", None, 0.0, None)
    assert chosen_loss("exo_pair", None, None, None).terms[0].settings == {"beta": 0.1, "label_smoothing": LOSS.label_smoothing}
