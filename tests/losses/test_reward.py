"""Reward models' loss, and the preference of likelihoods, against numbers worked out by hand."""

import pytest
import torch

from posttrain.losses.reward import likelihood_preference, reward_loss


def test_bradley_terry_with_margin_weight_and_centering() -> None:
    # scores 2, 0.5 and -1, 1 with margin 0.5 and 0: -log sigma(1) = 0.313262, -log sigma(-2) = 2.126928
    scores, margin, weight = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([0.5, 0.0]), torch.tensor([0.5, 3.0])
    output = reward_loss(scores, margin, weight, centering=0.01)
    assert output.total.item() == pytest.approx(0.5 * (0.313262 + 0.01 * 2.5**2) + 3 * 2.126928, abs=1e-5)
    assert output.metrics["loss"][1] == 3.5
    figures = {name: (float(total), count) for name, (total, count) in output.metrics.items() if name != "loss"}
    assert figures == {
        "accuracy": (1.0, 2.0), "margin": (1.5 - 2.0, 2.0), "score_chosen": (1.0, 2.0), "score_rejected": (1.5, 2.0),
    }  # fmt: skip
    scores = {name: output.rows[name].tolist() for name in ("chosen", "rejected")}
    assert scores == {"chosen": [2.0, -1.0], "rejected": [0.5, 1.0]}
    assert float(output.rows["loss"].sum()) == pytest.approx(float(output.total)) and len(output.rows["loss"]) == 2


def test_only_the_difference_of_scores_counts_without_centering() -> None:
    scores, margin, weight = torch.tensor([2.0, 0.5, -1.0, 1.0]), torch.tensor([0.5, 0.0]), torch.ones(2)
    losses = [reward_loss(scores + shift, margin, weight, centering=0.0).total.item() for shift in (0.0, 7.0)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_likelihood_preference_is_per_token() -> None:
    # means -5, -3 | -1, -2: the first pair wrong by 2, the second right by 1
    output = likelihood_preference(torch.tensor([-10.0, -12.0, -5.0, -4.0]), torch.tensor([2.0, 4.0, 5.0, 2.0]))
    assert {name: (float(total), count) for name, (total, count) in output.metrics.items()} == {
        "accuracy": (1.0, 2.0), "gap": (-1.0, 2.0),
    }  # fmt: skip
    assert not output.total.requires_grad
