"""The loss that a language model found when it was asked for losses."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def discopop(pairs: Pairs, *, beta: float, tau: float = 0.05) -> Tensor:
    """(1 - m) -log sigma(x) + m exp(-x), x = beta h, m = sigma(x / tau), h the chosen log-ratio minus the rejected one: [P]
    (Lu et al. 2024, arXiv 2406.08414, eq. 5).

    Args:
        tau: how sharply it goes over from the one part to the other at x = 0.
    """
    x = beta * margins(pairs.ratio)
    share = torch.sigmoid(x / tau)
    return -logsigmoid(x) * (1 - share) + torch.exp(-x) * share


LOSS = PreferenceLoss(discopop, needs_reference=True)
