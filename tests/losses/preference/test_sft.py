"""The chosen answers' likelihood by hand, and that the rejected ones count for nothing."""

import torch

from posttrain.losses.pairs import Pairs
from posttrain.losses.preference.sft import LOSS, sft

# log-ratios +1, -1 and 0, +1
PAIRS = Pairs(torch.tensor([-10.0, -12, -5, -4]), torch.tensor([-11.0, -11, -5, -5]), torch.tensor([2.0, 4, 5, 2]))


def test_by_hand() -> None:
    assert sft(PAIRS).tolist() == [5.0, 1.0]


def test_a_pair_counts_alike_whatever_its_length_and_the_rejected_answer_not_at_all() -> None:
    policy = torch.tensor([-2.0, -7.0, -8.0, -7.0], requires_grad=True)
    sft(Pairs(policy, None, torch.tensor([2.0, 4, 8, 2]))).sum().backward()
    assert policy.grad is not None and policy.grad.tolist() == [-0.5, 0.0, -0.125, 0.0]
    assert not LOSS.needs_reference and LOSS.beta is None
