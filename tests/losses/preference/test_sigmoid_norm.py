"""DPO's loss per token against numbers worked out by hand, against TRL's, and what it must not depend on."""

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.sigmoid_norm import LOSS, sigmoid_norm


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_by_hand() -> None:
    # per-token ratios +1/2, -1/4 and 0, +1/2: margins 3/4 and -1/2
    pairs = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))
    found = sigmoid_norm(pairs, beta=2.0, label_smoothing=0.0)
    assert found.tolist() == pytest.approx([softplus(-1.5), softplus(1.0)], abs=1e-6)
    smoothed = sigmoid_norm(pairs, beta=2.0, label_smoothing=0.1)
    assert smoothed.tolist() == pytest.approx(
        [0.9 * softplus(-1.5) + 0.1 * softplus(1.5), 0.9 * softplus(1.0) + 0.1 * softplus(-1.0)], abs=1e-6
    )


def test_it_is_trls(trl_loss: Callable[..., float], ragged: tuple[Tensor, Tensor, Tensor]) -> None:
    mine = sigmoid_norm(Pairs(*ragged), beta=5.0, label_smoothing=0.0)
    assert float(mine.mean()) == pytest.approx(trl_loss("sigmoid_norm", *ragged, 5.0), abs=1e-6)


def test_an_answer_said_three_times_over_counts_as_once(ragged: tuple[Tensor, Tensor, Tensor]) -> None:
    policy, reference, lengths = ragged
    times = torch.tensor([3.0, 1] * 6)
    long = sigmoid_norm(Pairs(policy * times, reference * times, lengths * times), beta=2.0, label_smoothing=0.0)
    assert torch.allclose(long, sigmoid_norm(Pairs(*ragged), beta=2.0, label_smoothing=0.0), atol=1e-6)
    assert LOSS.needs_reference and LOSS.smooths_labels and not LOSS.options
