"""AOT without pairs by hand, against TRL's, its gradient against autograd of the formula, and that pairs do not matter."""

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss
from posttrain.losses.preference.aot_unpaired import LOSS, aot_unpaired, rivals
from posttrain.losses.preference.sigmoid import sigmoid

Table = torch.Tensor


def test_by_hand() -> None:
    # log-ratios of the chosen answers 1 and -1, of the rejected ones 0 and 3: 1 meets 3, and -1 meets 0
    pairs = Pairs(torch.tensor([-10.0, -11, -6, -3]), torch.tensor([-11.0, -11, -5, -6]), torch.ones(4))
    assert rivals(pairs).tolist() == [[3.0, -1.0], [0.0, 1.0]]
    # by rank softplus(2) = 2.126928 and softplus(1) = 1.313262; of either pair of rows the mean of its two answers'
    found = aot_unpaired(pairs, beta=1.0, label_smoothing=0.0)
    assert found.tolist() == pytest.approx([(2.126928 + 1.313262) / 2] * 2, abs=1e-5)


def test_it_is_trls(ragged: tuple[Table, ...], trl_loss: Callable[..., float]) -> None:
    found = chosen_loss("aot_unpaired", 0.3, 0.1, None)(Pairs(*ragged), torch.ones(6))
    assert float(found.total / 6) == pytest.approx(trl_loss("aot_unpaired", *ragged, 0.3, label_smoothing=0.1), abs=1e-6)


def test_the_gradient_goes_through_both_answers(ragged: tuple[Table, ...]) -> None:
    policy, reference, lengths = ragged
    mine, theirs = (policy.clone().requires_grad_() for _ in range(2))
    aot_unpaired(Pairs(mine, reference, lengths), beta=0.3, label_smoothing=0.1).sum().backward()
    ratio = theirs - reference
    delta = 0.3 * (ratio[0::2].sort().values - ratio[1::2].sort().values)
    (-0.9 * logsigmoid(delta) - 0.1 * logsigmoid(-delta)).sum().backward()
    assert mine.grad is not None and theirs.grad is not None and float(theirs.grad.abs().min()) > 0
    assert mine.grad.tolist() == pytest.approx(theirs.grad.tolist(), abs=1e-7)


def test_pairs_do_not_matter_and_one_pair_is_dpo(ragged: tuple[Table, ...]) -> None:
    pairs = Pairs(*ragged)
    order = torch.stack([torch.arange(0, 12, 2), torch.tensor([7, 1, 11, 3, 9, 5])], 1).flatten()  # other rejected answers
    mixed = Pairs(*(table[order] for table in ragged))
    one, two = (float(aot_unpaired(each, beta=0.3, label_smoothing=0.0).sum()) for each in (pairs, mixed))
    assert one == pytest.approx(two, abs=1e-5)
    alone = Pairs(*(table[:2] for table in ragged))
    assert torch.allclose(aot_unpaired(alone, beta=0.3, label_smoothing=0.0), sigmoid(alone, beta=0.3, label_smoothing=0.0))
    told = replace(alone, step=torch.tensor([[1.0, 2.0]]))
    assert not torch.allclose(aot_unpaired(told, beta=0.3, label_smoothing=0.0), sigmoid(alone, beta=0.3, label_smoothing=0.0))
    assert LOSS.over_step and not LOSS.unpaired
