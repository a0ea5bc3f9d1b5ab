"""SPPO by hand, and where both answers come to rest."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.sppo_hard import LOSS, sppo_hard

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    assert sppo_hard(PAIRS, beta=0.25).tolist() == pytest.approx([(1 - 2) ** 2 + (-1 + 2) ** 2, 2**2 + 3**2], abs=1e-5)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_both_answers_come_to_rest_half_over_beta_from_the_start(beta: float) -> None:
    policy = torch.tensor([0.5 / beta, -0.5 / beta], requires_grad=True)
    loss = sppo_hard(Pairs(policy, torch.zeros(2), torch.ones(2)), beta=beta)
    loss.sum().backward()
    assert policy.grad is not None and loss.tolist() == [0.0] and policy.grad.tolist() == [0.0, 0.0] and LOSS.needs_reference
