"""Token loss against numbers worked out by hand."""

import math

import pytest
import torch

from posttrain.losses.tokens import answer_sums, token_loss


def test_sum_of_weighted_negative_log_probs() -> None:
    # -(1 * ln .5 + 2 * ln .25) = ln 2 + 2 * 2 ln 2 = 5 ln 2; count 1 + 2
    logps = torch.tensor([0.5, 0.25]).log()
    output = token_loss(logps, torch.tensor([1.0, 2.0]))
    assert output.total.item() == pytest.approx(5 * math.log(2), abs=1e-6)
    total, count = output.metrics["loss"]
    assert total.item() / count == pytest.approx(5 * math.log(2) / 3, abs=1e-6)


def test_answer_sums_by_owner() -> None:
    sums = answer_sums(torch.tensor([1.0, 2.0, 4.0, 8.0]), torch.tensor([0, 2, 2, 0]), 3)
    assert sums.tolist() == [9.0, 0.0, 6.0]
