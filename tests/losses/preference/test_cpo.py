"""CPO by hand, and that it is DPO with a uniform reference and the likelihood."""

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.cpo import LOSS, cpo
from posttrain.losses.preference.sigmoid import sigmoid

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    # log-probs apart by 2 and -1; a token of the chosen answers has 5 and 1 nats
    found = cpo(PAIRS, beta=0.5, label_smoothing=0.0, alpha=2.0).tolist()
    assert found == pytest.approx([0.313262 + 2 * 5, 0.974077 + 2 * 1], abs=1e-5)


def test_without_the_likelihood_it_is_dpo_against_a_reference_that_knows_nothing(ragged: tuple[torch.Tensor, ...]) -> None:
    policy, _, lengths = ragged
    expected = sigmoid(Pairs(policy, torch.zeros(len(policy)), lengths), beta=0.3, label_smoothing=0.1)
    found = cpo(Pairs(policy, None, lengths), beta=0.3, label_smoothing=0.1, alpha=0.0)
    assert found.tolist() == pytest.approx(expected.tolist(), abs=1e-6)
    assert not LOSS.needs_reference and LOSS.options == {"alpha": 1.0}
