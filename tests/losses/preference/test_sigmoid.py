"""DPO's loss against numbers worked out by hand, against TRL's, and what it must not depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.sigmoid import LOSS, sigmoid

# two pairs: chosen, rejected, chosen, rejected; log-ratios +1, -1 and 0, +1, so margins of 2 and -1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_by_hand() -> None:
    # -log sigma(0.1 * 2) = softplus(-0.2), -log sigma(0.1 * -1) = softplus(0.1)
    assert sigmoid(PAIRS, beta=0.1, label_smoothing=0.0).tolist() == pytest.approx([softplus(-0.2), softplus(0.1)], abs=1e-6)


def test_label_smoothing_is_cdpo() -> None:
    expected = [0.8 * softplus(-0.2) + 0.2 * softplus(0.2), 0.8 * softplus(0.1) + 0.2 * softplus(-0.1)]
    assert sigmoid(PAIRS, beta=0.1, label_smoothing=0.2).tolist() == pytest.approx(expected, abs=1e-6)


def test_it_is_trls(trl_loss: Callable[..., float], ragged: tuple[Tensor, Tensor, Tensor]) -> None:
    mine = sigmoid(Pairs(*ragged), beta=0.3, label_smoothing=0.0)
    assert float(mine.mean()) == pytest.approx(trl_loss("sigmoid", *ragged, 0.3), abs=1e-6)


def test_its_gradient_pushes_chosen_up_and_rejected_down() -> None:
    """d/d chosen = -beta sigma(-beta h), and the opposite for rejected (eq. 7's gradient)."""
    policy = PAIRS.policy.clone().requires_grad_()
    sigmoid(Pairs(policy, PAIRS.reference, PAIRS.lengths), beta=0.1, label_smoothing=0.0).sum().backward()
    first, second = 0.1 / (1 + math.exp(0.2)), 0.1 / (1 + math.exp(-0.1))
    assert policy.grad is not None and policy.grad.tolist() == pytest.approx([-first, first, -second, second], abs=1e-6)


def test_lengths_do_not_count_and_pairs_the_other_way_round_smooth_the_other_way(
    ragged: tuple[Tensor, Tensor, Tensor],
) -> None:
    policy, reference, lengths = ragged
    turned = [*(i ^ 1 for i in range(12))]
    found = sigmoid(Pairs(policy, reference, lengths), beta=0.5, label_smoothing=0.3)
    other = sigmoid(Pairs(policy[turned], reference[turned], lengths * 2), beta=0.5, label_smoothing=0.7)
    assert torch.allclose(found, other, atol=1e-6)
    assert LOSS.needs_reference and LOSS.smooths_labels and not LOSS.options


def test_before_the_first_step_it_is_log_2(ragged: tuple[Tensor, Tensor, Tensor]) -> None:
    _, reference, lengths = ragged
    found = sigmoid(Pairs(reference, reference, lengths), beta=0.1, label_smoothing=0.0)
    assert found.tolist() == pytest.approx([math.log(2)] * 6)
