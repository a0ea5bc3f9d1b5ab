"""AOT by hand, against TRL's, and that only the ranks tie policy and reference."""

from collections.abc import Callable

import pytest
import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss
from posttrain.losses.preference.aot import LOSS, aot, same_rank
from posttrain.losses.preference.sigmoid import sigmoid


def test_by_hand() -> None:
    # margins of the policy 2 and -1, of the reference 0 and 1: 2 meets 1, and -1 meets 0
    pairs = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -6]), torch.ones(4))
    assert same_rank(pairs).tolist() == [1.0, 0.0]
    # softplus(-1) = 0.313262, softplus(1) = 1.313262
    assert aot(pairs, beta=1.0, label_smoothing=0.0).tolist() == pytest.approx([0.313262, 1.313262], abs=1e-5)


def test_it_is_trls(ragged: tuple[torch.Tensor, ...], trl_loss: Callable[..., float]) -> None:
    found = chosen_loss("aot", 0.3, 0.1, None)(Pairs(*ragged), torch.ones(6))
    assert float(found.total / 6) == pytest.approx(trl_loss("aot", *ragged, 0.3, label_smoothing=0.1), abs=1e-6)


def test_it_does_not_ask_whose_reference_margin_is_whose_and_of_one_pair_it_is_dpo(ragged: tuple[torch.Tensor, ...]) -> None:
    policy, reference, lengths = ragged
    other = reference.view(6, 2)[[3, 1, 0, 5, 4, 2]].flatten()
    one, two = (aot(Pairs(policy, each, lengths), beta=0.3, label_smoothing=0.0) for each in (reference, other))
    assert one.tolist() == two.tolist()
    pair = Pairs(policy[:2], reference[:2], lengths[:2])
    assert torch.equal(aot(pair, beta=0.3, label_smoothing=0.0), sigmoid(pair, beta=0.3, label_smoothing=0.0))
    assert LOSS.over_step and not LOSS.unpaired
