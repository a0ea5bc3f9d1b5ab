"""BCO by hand, and that its shift makes it blind to a drift that all answers have in common."""

from dataclasses import replace

import pytest
import torch

from posttrain.losses.answers import Answers
from posttrain.losses.preference.bco import LOSS, bco, shift

GOOD = torch.tensor([True, False, True])
ANSWERS = Answers(torch.tensor([-10.0, -12, -3]), torch.tensor([-11.0, -11, -5]), torch.tensor([2.0, 4, 5]), GOOD)


def test_by_hand() -> None:
    # log-ratios +1, -1, +2: good ones have a mean of 1.5, the other -1, halfway 0.25
    assert shift(ANSWERS).tolist() == [0.25] * 3
    # softplus(-0.75) = 0.386872, softplus(-1.25) = 0.251929, softplus(-1.75) = 0.160221
    found = bco(replace(ANSWERS, step=shift(ANSWERS)), beta=1.0, undesirable_weight=2.0)
    assert found.tolist() == pytest.approx([0.386872, 2 * 0.251929, 0.160221], abs=1e-5)


def test_a_drift_of_all_answers_alike_changes_nothing() -> None:
    moved = replace(ANSWERS, policy=ANSWERS.policy + 7)
    losses = [bco(replace(each, step=shift(each)), beta=0.3) for each in (ANSWERS, moved)]
    assert losses[0].tolist() == pytest.approx(losses[1].tolist(), abs=1e-5)


def test_of_one_label_alone_the_shift_is_its_mean() -> None:
    alone = replace(ANSWERS, good=torch.ones(3, dtype=torch.bool))
    assert shift(alone).tolist() == pytest.approx([2 / 3] * 3)
    assert LOSS.unpaired and LOSS.over_step and not LOSS.over_step.mismatched
