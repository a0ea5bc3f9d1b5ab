"""The loss of group sequence policy optimisation."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.surrogates import PolicyLoss, Sampled


def gspo(sampled: Sampled, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(s A, clip(s, 1 - low, 1 + high) A), s the geometric mean of an answer's ratios (Zheng et al. 2025, arXiv 2507.18071,
    eq. 5 and 7). An answer is clipped as a whole. s stays near 1: the range is about 1000 times as narrow as PPO's.
    """
    answers = int(sampled.answer.max()) + 1 if len(sampled.answer) else 0
    zeros = sampled.logps.new_zeros(answers)
    logs = zeros.index_add(0, sampled.answer, sampled.logps - sampled.old)
    tokens = zeros.index_add(0, sampled.answer, torch.ones_like(sampled.old))
    ratio = torch.exp(logs / tokens.clamp(min=1))[sampled.answer]
    return sampled.clipped(ratio, low, high), ratio


LOSS = PolicyLoss(gspo, mean="answer")
