"""Kahneman-Tversky optimisation: answers that are each good or not, against the model's own drift."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.answers import Answers, labelled
from posttrain.losses.pairs import OverStep, PreferenceLoss


def kto(answers: Answers, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """1 - sigma(beta (l - z)) of a good answer, 1 - sigma(beta (z - l)) of another, l the log-ratio, z the KL of the model to its
    start: [A] (Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7 and 8).

    Args:
        desirable_weight: what a good answer counts, lambda_D of the paper.
        undesirable_weight: what another one counts, lambda_U.
    """
    return labelled(1 - torch.sigmoid(beta * answers.shifted), answers, desirable_weight, undesirable_weight)


def drift(mismatched: Answers) -> Tensor:
    """max(0, mean log-ratio) over the step's prompts, each with the answer to another one: [A] times the same number.

    Section 4.1 of the paper: a biased, cheap estimate of the KL, through which no gradient goes. It is of the whole step, where
    the authors and TRL take that of a micro-batch.
    """
    mean = mismatched.ratio.double().mean().clamp(min=0)
    return mean.to(mismatched.policy.dtype).expand(len(mismatched.policy))


LOSS = PreferenceLoss(kto, needs_reference=True, unpaired=True, over_step=OverStep(drift, "kl", mismatched=True))
