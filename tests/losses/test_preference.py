"""DPO and its variants against numbers worked out by hand, and in their limits."""

import math

import pytest
import torch

from posttrain.losses.preference import dpo_loss, likelihood_preference, reward_loss

POLICY = torch.tensor([-10.0, -12.0, -5.0, -4.0])  # two pairs: chosen, rejected, chosen, rejected
REFERENCE = torch.tensor([-11.0, -11.0, -5.0, -5.0])  # log-ratios +1, -1 and 0, +1: margins h = 2 and -1
LENGTHS = torch.tensor([2.0, 4.0, 5.0, 2.0])
ONES = torch.ones(2)


def loss(**changes: object) -> float:
    options = {"beta": 0.1, "kind": "sigmoid", "label_smoothing": 0.0} | changes
    return dpo_loss(POLICY, REFERENCE, LENGTHS, ONES, **options).total.item()  # type: ignore[arg-type]


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_sigmoid() -> None:
    # -log sigma(0.1 * 2) - log sigma(0.1 * -1) = softplus(-0.2) + softplus(0.1)
    assert loss() == pytest.approx(softplus(-0.2) + softplus(0.1), abs=1e-6)


def test_label_smoothing_is_cdpo() -> None:
    straight, flipped = softplus(-0.2) + softplus(0.1), softplus(0.2) + softplus(-0.1)
    assert loss(label_smoothing=0.2) == pytest.approx(0.8 * straight + 0.2 * flipped, abs=1e-6)


def test_length_normalised() -> None:
    # per-token ratios +1/2, -1/4 and 0, +1/2: margins 3/4 and -1/2
    assert loss(kind="sigmoid_norm", beta=2.0) == pytest.approx(softplus(-1.5) + softplus(1.0), abs=1e-6)


def test_ipo_pulls_the_margin_to_half_over_beta() -> None:
    assert loss(kind="ipo", beta=0.5) == pytest.approx((0.75 - 1) ** 2 + (-0.5 - 1) ** 2, abs=1e-6)


def test_before_the_first_step() -> None:
    """Policy equal to the reference: loss log 2 a pair, margin exactly zero, accuracy a coin's."""
    output = dpo_loss(REFERENCE, REFERENCE, LENGTHS, ONES, beta=0.1, kind="sigmoid", label_smoothing=0.0)
    assert output.total.item() == pytest.approx(2 * math.log(2), abs=1e-6)
    means = {name: (total / count).item() for name, (total, count) in output.metrics.items()}
    assert means["margin"] == 0.0 and means["accuracy"] == 0.5


def test_metrics() -> None:
    output = dpo_loss(POLICY, REFERENCE, LENGTHS, ONES, beta=0.1, kind="sigmoid", label_smoothing=0.0)
    means = {name: (total / count).item() for name, (total, count) in output.metrics.items()}
    assert means["accuracy"] == 0.5
    assert means["margin"] == pytest.approx(0.1 * (2 - 1) / 2)
    assert means["reward_chosen"] == pytest.approx(0.1 * (1 + 0) / 2)
    assert means["logp_rejected"] == pytest.approx(-8.0)


def test_gradient_pushes_chosen_up_and_rejected_down() -> None:
    """d/d chosen = -beta sigma(-beta h), and the opposite for rejected (eq. 7's gradient)."""
    policy = POLICY.clone().requires_grad_()
    dpo_loss(policy, REFERENCE, LENGTHS, ONES, beta=0.1, kind="sigmoid", label_smoothing=0.0).total.backward()
    first = 0.1 / (1 + math.exp(0.2))
    assert policy.grad is not None
    assert policy.grad[:2].tolist() == pytest.approx([-first, first], abs=1e-6)


def test_a_pairs_weight_is_of_its_loss_alone() -> None:
    weight = torch.tensor([0.5, 3.0])
    output = dpo_loss(POLICY, REFERENCE, LENGTHS, weight, beta=0.1, kind="sigmoid", label_smoothing=0.0)
    assert output.total.item() == pytest.approx(0.5 * softplus(-0.2) + 3 * softplus(0.1), abs=1e-6)
    assert output.metrics["loss"][1] == 3.5
    assert [(float(output.metrics[name][0]), output.metrics[name][1]) for name in ("accuracy", "margin")] == [
        (1.0, 2.0), (pytest.approx(0.1 * (2 - 1)), 2.0),
    ]  # fmt: skip
    # scores 2, 0.5 and -1, 1 with margin 0.5 and 0: -log sigma(1) = 0.313262, -log sigma(-2) = 2.126928
    scores, margin = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([0.5, 0.0])
    output = reward_loss(scores, margin, weight, centering=0.01)
    assert output.total.item() == pytest.approx(0.5 * (0.313262 + 0.01 * 2.5**2) + 3 * 2.126928, abs=1e-5)
    assert output.metrics["loss"][1] == 3.5 and output.metrics["accuracy"][1] == 2.0


def test_likelihood_preference_is_per_token() -> None:
    # means -5, -3 | -1, -2: the first pair wrong, the second right
    means = likelihood_preference(POLICY, LENGTHS).metrics["accuracy"]
    assert (means[0] / means[1]).item() == 0.5
