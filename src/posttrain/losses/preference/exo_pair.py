"""Efficient exact optimisation on pairs: the reverse KL where the loss of DPO has the forward one."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def exo_pair(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """KL[(q, 1-q) || (1-e, e)], q = sigma(beta h), h the chosen log-ratio minus the rejected one: [P].

    Ji et al. 2024, arXiv 2402.00856, eq. 16, with e 1e-3; at 0 it is infinite.
    """
    h = beta * margins(pairs.ratio)
    chosen = torch.sigmoid(h) * (logsigmoid(h) - math.log1p(-label_smoothing))
    return chosen + torch.sigmoid(-h) * (logsigmoid(-h) - math.log(label_smoothing))


LOSS = PreferenceLoss(exo_pair, needs_reference=True, smooths_labels=True, label_smoothing=1e-3, needs_smoothing=True)
