"""Losses on preference pairs. A pair's weight is how often it counts in the loss; all other figures are means over pairs as they
are, so that runs of different weights can be compared by them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.batch import LossOutput

DpoLoss = Literal["sigmoid", "ipo", "sigmoid_norm"]


def dpo_loss(
    policy: Tensor, reference: Tensor, lengths: Tensor, weight: Tensor, *, beta: float, kind: DpoLoss, label_smoothing: float
) -> LossOutput:
    """Sum over P pairs of weight times the DPO loss (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    policy, reference: log-probs of whole answers, float32 [2P], chosen at even and rejected at odd places.
    lengths: tokens of each answer [2P]; weight: of each pair [P]. With h = (policy - reference) of chosen minus that of rejected:

    sigmoid       -log sigma(beta h); with label smoothing e: -(1-e) log sigma(beta h) - e log sigma(-beta h) (cDPO)
    sigmoid_norm  the same with each log-ratio divided by its answer's length
    ipo           (h - 1 / (2 beta))^2 with per-token mean log-ratios (Azar et al. 2023, arXiv 2310.12036, eq. 17)
    """
    ratio = policy - reference
    scaled = ratio / lengths if kind != "sigmoid" else ratio
    margin = scaled[0::2] - scaled[1::2]
    if kind == "ipo":
        losses = (margin - 1 / (2 * beta)) ** 2
    else:
        losses = -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)
    reward = beta * ratio.detach()
    chosen, rejected = reward[0::2], reward[1::2]
    pairs = float(len(losses))
    total = (weight * losses).sum()
    # A tie is half right: before the first step every margin is exactly zero.
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return LossOutput(
        total,
        {
            "loss": (total.detach(), weight.sum()),
            "accuracy": (right.sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "reward_chosen": (chosen.sum(), pairs),
            "reward_rejected": (rejected.sum(), pairs),
            "logp_chosen": (policy.detach()[0::2].sum(), pairs),
            "logp_rejected": (policy.detach()[1::2].sum(), pairs),
        },
    )


def reward_loss(scores: Tensor, margin: Tensor, weight: Tensor, *, centering: float) -> LossOutput:
    """Sum over P pairs of weight times the Bradley-Terry loss -log sigma(r_w - r_l - margin) + centering (r_w + r_l)^2.

    scores: float32 [2P], chosen at even and rejected at odd places; margin, weight [P]. (Stiennon et al. 2020, arXiv 2009.01325,
    eq. 1; the margin of Touvron et al. 2023, arXiv 2307.09288, eq. 2; centering of Eisenstein et al. 2023, arXiv 2312.09244,
    section 4.)
    """
    chosen, rejected = scores[0::2], scores[1::2]
    losses = -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
    total = (weight * losses).sum()
    chosen, rejected = chosen.detach(), rejected.detach()
    pairs = float(len(chosen))
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return LossOutput(
        total,
        {
            "loss": (total.detach(), weight.sum()),
            "accuracy": (right.sum(), pairs),
            "margin": ((chosen - rejected).sum(), pairs),
            "score_chosen": (chosen.sum(), pairs),
            "score_rejected": (rejected.sum(), pairs),
        },
        {"chosen": chosen, "rejected": rejected},
    )


def likelihood_preference(policy: Tensor, lengths: Tensor) -> LossOutput:
    """Does the model itself find the chosen answer likelier, per token? Needs no reference; nothing to train on.

    policy: log-probs of whole answers [2P]; lengths [2P]. `accuracy` counts a tie as half.
    """
    mean = (policy / lengths).detach()
    chosen, rejected = mean[0::2], mean[1::2]
    pairs = float(len(chosen))
    right = (chosen > rejected).float() + 0.5 * (chosen == rejected).float()
    return LossOutput(torch.zeros(()), {"accuracy": (right.sum(), pairs), "gap": ((chosen - rejected).sum(), pairs)})
