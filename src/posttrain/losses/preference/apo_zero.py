"""Anchored preference optimisation where the chosen answers are better than the model's own."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss


def apo_zero(pairs: Pairs, *, beta: float) -> Tensor:
    """1 - sigma(r_w) + sigma(r_l), r beta times the log-ratio: [P] (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7).

    The chosen answer's likelihood is raised and the rejected one's lowered, each against the start.
    """
    rewards = beta * pairs.ratio
    return 1 - torch.sigmoid(rewards[0::2]) + torch.sigmoid(rewards[1::2])


LOSS = PreferenceLoss(apo_zero, needs_reference=True)
