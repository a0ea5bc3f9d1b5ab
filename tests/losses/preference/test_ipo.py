"""IPO's loss against numbers worked out by hand, against TRL's, and where it comes to rest."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.ipo import LOSS, ipo


def test_by_hand() -> None:
    # per-token ratios +1/2, -1/4 and 0, +1/2: margins 3/4 and -1/2, which should be 1 / (2 * 0.5) = 1
    pairs = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))
    assert ipo(pairs, beta=0.5).tolist() == pytest.approx([(0.75 - 1) ** 2, (-0.5 - 1) ** 2], abs=1e-6)


def test_it_is_trls(trl_loss: Callable[..., float], ragged: tuple[Tensor, Tensor, Tensor]) -> None:
    assert float(ipo(Pairs(*ragged), beta=0.4).mean()) == pytest.approx(trl_loss("ipo", *ragged, 0.4), abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_the_margin_comes_to_rest_at_half_over_beta_and_is_pulled_back_beyond(beta: float) -> None:
    lengths = torch.tensor([4.0, 5.0])
    for off, sign in ((0.0, 0), (0.3, 1), (-0.3, -1)):
        policy = torch.tensor([4 * (1 / (2 * beta) + off), 0.0], requires_grad=True)  # a margin of 1 / (2 beta) + off
        loss = ipo(Pairs(policy, torch.zeros(2), lengths), beta=beta)
        loss.sum().backward()
        assert policy.grad is not None
        assert float(loss.detach()) == pytest.approx(off**2, abs=1e-5)
        assert policy.grad.tolist() == pytest.approx([2 * off / 4, -2 * off / 5], abs=1e-5)
        assert not off or float(policy.grad[0].sign()) == sign
    assert LOSS.needs_reference and not LOSS.smooths_labels and not LOSS.options
