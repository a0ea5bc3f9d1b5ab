"""KTO by hand, against TRL's, and what its drift does."""

import math
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from posttrain.losses.answers import Answers, labelled_likelihood
from posttrain.losses.preference import chosen_loss
from posttrain.losses.preference.kto import LOSS, drift, kto

# log-ratios +1, -1 and +2; the second one is not good
GOOD = torch.tensor([True, False, True])
ANSWERS = Answers(torch.tensor([-10.0, -12, -3]), torch.tensor([-11.0, -11, -5]), torch.tensor([2.0, 4, 5]), GOOD)


def test_by_hand() -> None:
    found = kto(replace(ANSWERS, step=torch.full((3,), 0.5)), beta=1.0, desirable_weight=2.0, undesirable_weight=0.5)
    sigma = [1 / (1 + math.exp(-x)) for x in (1 - 0.5, 0.5 + 1, 2 - 0.5)]
    assert found.tolist() == pytest.approx([2 * (1 - sigma[0]), 0.5 * (1 - sigma[1]), 2 * (1 - sigma[2])], abs=1e-6)


def test_the_drift_is_the_mean_log_ratio_and_never_below_zero() -> None:
    assert drift(ANSWERS).tolist() == pytest.approx([2 / 3] * 3)
    assert drift(replace(ANSWERS, policy=ANSWERS.policy - 9)).tolist() == [0.0] * 3


@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_it_is_trls(shift: float, trl_kto: Callable[..., float]) -> None:
    """shift: of the policy's log-probs of mismatched answers."""
    torch.manual_seed(0)
    policy, reference, mismatched = -10 * torch.rand(6), -10 * torch.rand(6), -10 * torch.rand(6)
    good = torch.tensor([True, False, False, True, True, False])
    other = Answers(mismatched + shift, mismatched - 0.2, torch.ones(6), good)
    expected = trl_kto("kto", policy, reference, good, other, beta=0.3, desirable_weight=1.5, undesirable_weight=0.7)
    options = {"desirable_weight": 1.5, "undesirable_weight": 0.7}
    given = Answers(policy, reference, torch.ones(6), good, drift(other))
    found = chosen_loss("kto", 0.3, None, options)(given, torch.ones(6))
    assert float(found.total / 6) == pytest.approx(expected, abs=1e-6)
    assert float(found.metrics["kl"][0] / found.metrics["kl"][1]) == pytest.approx(max(0.0, shift + 0.2), abs=1e-5)


def test_at_the_start_it_is_a_half_and_gradients_point_by_the_label_and_not_through_the_drift() -> None:
    policy = torch.zeros(3, requires_grad=True)
    answers = Answers(policy, torch.zeros(3), torch.ones(3), GOOD, torch.zeros(3))
    loss = kto(answers, beta=0.4)
    loss.sum().backward()
    assert loss.tolist() == [0.5] * 3 and policy.grad is not None
    assert policy.grad.tolist() == pytest.approx([-0.1, 0.1, -0.1])
    assert not drift(answers).requires_grad or LOSS.over_step is not None
    assert LOSS.unpaired and LOSS.over_step and LOSS.over_step.mismatched


def test_figures_are_by_label_and_accuracy_is_the_right_side_of_the_drift() -> None:
    found = chosen_loss("kto", 0.5, None, None)(replace(ANSWERS, step=torch.full((3,), 1.5)), torch.ones(3)).metrics
    means = {name: float(total / count) for name, (total, count) in found.items()}
    assert means["reward_chosen"] == pytest.approx(0.5 * 1.5) and means["reward_rejected"] == pytest.approx(-0.5)
    assert means["logp_chosen"] == -6.5 and means["logp_rejected"] == -12 and means["kl"] == 1.5
    assert means["accuracy"] == pytest.approx(2 / 3)  # +1 is good and below 1.5


def test_eval_asks_for_the_likelihood_of_a_token_by_label() -> None:
    found = labelled_likelihood(torch.tensor([-1.0, -4.0, -2.0]), GOOD).metrics
    assert {name: float(total / count) for name, (total, count) in found.items()} == {"logp_chosen": -1.5, "logp_rejected": -4.0}
