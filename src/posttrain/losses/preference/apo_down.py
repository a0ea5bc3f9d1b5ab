"""Anchored preference optimisation where the model's own answers are better than the chosen ones."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def apo_down(pairs: Pairs, *, beta: float) -> Tensor:
    """sigma(r_w) + 1 - sigma(r_w - r_l), r beta times the log-ratio: [P] (D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8).

    The likelihood of both answers is lowered, the rejected one's more.
    """
    rewards = beta * pairs.ratio
    return torch.sigmoid(rewards[0::2]) + 1 - torch.sigmoid(margins(rewards))


LOSS = PreferenceLoss(apo_down, needs_reference=True)
