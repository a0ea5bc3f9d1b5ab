"""Losses of reward models on preference pairs, and the preference that a language model's own likelihood has."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.batch import LossOutput
from posttrain.losses.pairs import margins, pair_metrics, right, weighted


def reward_loss(scores: Tensor, margin: Tensor, weight: Tensor, *, centering: float) -> LossOutput:
    """Sum over P pairs of weight times the Bradley-Terry loss -log sigma(r_w - r_l - margin) + centering (r_w + r_l)^2.

    Stiennon et al. 2020, arXiv 2009.01325, eq. 1; the margin of Touvron et al. 2023, arXiv 2307.09288, eq. 2; centering of
    Eisenstein et al. 2023, arXiv 2312.09244, section 4.

    Args:
        scores: r, float32 [2P], chosen at even and rejected at odd places.
        margin: by how much the chosen answer should win, [P].
        weight: of each pair, [P].
    """
    chosen, rejected = scores[0::2], scores[1::2]
    losses = -logsigmoid(chosen - rejected - margin) + centering * (chosen + rejected) ** 2
    chosen, rejected = chosen.detach(), rejected.detach()
    output = weighted(losses, weight, pair_metrics(chosen, rejected, "score"))
    return replace(output, rows={**output.rows, "chosen": chosen, "rejected": rejected})


def likelihood_preference(policy: Tensor, lengths: Tensor) -> LossOutput:
    """Does the model itself find the chosen answer likelier, per token? Needs no reference; nothing to train on.

    Args:
        policy: log-probs of whole answers, [2P].
        lengths: tokens of each answer, [2P].
    """
    mean = (policy / lengths).detach()
    gap, pairs = margins(mean), float(len(mean) // 2)
    return LossOutput(torch.zeros(()), {"accuracy": (right(mean[0::2], mean[1::2]).sum(), pairs), "gap": (gap.sum(), pairs)})
