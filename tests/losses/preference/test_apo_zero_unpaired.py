"""APO-zero of labelled answers by hand, against TRL's, and that both halves of a pair are the paired loss."""

from collections.abc import Callable

import pytest
import torch

from posttrain.losses.answers import Answers
from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.apo_zero import apo_zero
from posttrain.losses.preference.apo_zero_unpaired import LOSS, apo_zero_unpaired


def test_by_hand() -> None:
    answers = Answers(torch.tensor([-10.0, -12]), torch.tensor([-11.0, -11]), torch.ones(2), torch.tensor([True, False]))
    # sigma(1) = 0.731059 = 1 - sigma(-1)
    found = apo_zero_unpaired(answers, beta=1.0, desirable_weight=3.0).tolist()
    assert found == pytest.approx([3 * (1 - 0.731059), 1 - 0.731059], abs=1e-5)


def test_it_is_trls_and_the_paired_loss_taken_apart(ragged: tuple[torch.Tensor, ...], trl_kto: Callable[..., float]) -> None:
    policy, reference, lengths = ragged
    good = torch.arange(12) % 2 == 0
    answers = Answers(policy, reference, lengths, good)
    found = apo_zero_unpaired(answers, beta=0.3)
    expected = trl_kto("apo_zero_unpaired", policy, reference, good, None, beta=0.3)
    assert float(found.mean()) == pytest.approx(expected, abs=1e-6)
    assert (found[0::2] + found[1::2]).tolist() == pytest.approx(apo_zero(Pairs(*ragged), beta=0.3).tolist(), abs=1e-6)
    assert LOSS.unpaired and LOSS.over_step is None
