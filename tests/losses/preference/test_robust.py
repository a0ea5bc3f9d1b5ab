"""Robust DPO by hand, and that swapped labels do not move its mean."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.robust import LOSS, robust
from posttrain.losses.preference.sigmoid import sigmoid

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # at beta 0.5 and margin 2 softplus(-1) = 0.313262, softplus(1) = 1.313262; at margin -1 0.974077 and 0.474077
    first, second = (0.8 * 0.313262 - 0.2 * 1.313262) / 0.6, (0.8 * 0.974077 - 0.2 * 0.474077) / 0.6
    assert robust(PAIRS, beta=0.5, label_smoothing=0.2).tolist() == pytest.approx([first, second], abs=1e-5)


@pytest.mark.parametrize("share", [0.05, 0.3])
def test_the_mean_over_swapped_labels_is_the_loss_of_the_right_ones(share: float) -> None:
    swapped = Pairs(PAIRS.policy[[1, 0, 3, 2]], PAIRS.ratio.new_tensor([-11.0, -11, -5, -5])[[1, 0, 3, 2]], PAIRS.lengths)
    mean = (1 - share) * robust(PAIRS, beta=0.3, label_smoothing=share) + share * robust(swapped, beta=0.3, label_smoothing=share)
    assert mean.tolist() == pytest.approx(sigmoid(PAIRS, beta=0.3, label_smoothing=0.0).tolist(), abs=1e-6)
    assert LOSS.label_smoothing == 0.1
