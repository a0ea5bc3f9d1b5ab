"""BCO on pairs by hand, and that it bounds the loss of DPO."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.bco_pair import LOSS, bco_pair
from posttrain.losses.preference.sigmoid import sigmoid

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    assert bco_pair(PAIRS, beta=1.0).tolist() == pytest.approx([2 * 0.313262, 0.693147 + 1.313262], abs=1e-5)


def test_it_is_never_below_the_loss_of_dpo(ragged: tuple[torch.Tensor, ...]) -> None:
    for beta in (0.1, 1.0):
        pairs = Pairs(*ragged)
        assert bool((bco_pair(pairs, beta=beta) > sigmoid(pairs, beta=beta, label_smoothing=0.0)).all())
    assert LOSS.needs_reference and not LOSS.options
