"""NCA by hand, and that it pulls at the chosen answer itself."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.nca_pair import LOSS, nca_pair

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # rewards 1, -1 and 0, 1: softplus(-1) = 0.313262, softplus(1) = 1.313262, softplus(0) = 0.693147
    first, second = 0.313262 + 0.5 * (1.313262 + 0.313262), 0.693147 + 0.5 * (0.693147 + 1.313262)
    assert nca_pair(PAIRS, beta=1.0).tolist() == pytest.approx([first, second], abs=1e-5)


def test_a_chosen_answer_far_below_its_start_is_pulled_up_however_large_the_margin() -> None:
    policy = torch.tensor([-6.0, -60.0], requires_grad=True)
    nca_pair(Pairs(policy, torch.zeros(2), torch.ones(2)), beta=1.0).sum().backward()
    assert policy.grad is not None and float(policy.grad[0]) < -0.9 and float(policy.grad[1]) == pytest.approx(0, abs=1e-6)
    assert LOSS.needs_reference and not LOSS.smooths_labels
