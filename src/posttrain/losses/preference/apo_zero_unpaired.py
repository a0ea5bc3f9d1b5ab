"""Anchored preference optimisation on answers that are each good or not."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.answers import Answers, labelled
from posttrain.losses.pairs import PreferenceLoss


def apo_zero_unpaired(answers: Answers, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """1 - sigma(r) of a good answer, sigma(r) of another, r beta times the log-ratio: [A] (D'Oosterlinck et al. 2024, arXiv
    2408.06266, eq. 7, for either answer alone). It is `kto` against no drift.

    Args:
        desirable_weight: what a good answer counts.
        undesirable_weight: what another one counts.
    """
    return labelled(1 - torch.sigmoid(beta * answers.shifted), answers, desirable_weight, undesirable_weight)


LOSS = PreferenceLoss(apo_zero_unpaired, needs_reference=True, unpaired=True)
