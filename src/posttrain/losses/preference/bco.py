"""Binary classifier optimisation: answers that are each good or not, told apart by their implicit reward."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.answers import Answers, labelled
from posttrain.losses.pairs import OverStep, PreferenceLoss


def bco(answers: Answers, *, beta: float, desirable_weight: float = 1.0, undesirable_weight: float = 1.0) -> Tensor:
    """-log sigma(beta (l - d)) of a good answer, -log sigma(-beta (l - d)) of another, l the log-ratio: [A] (Jung et al. 2024,
    arXiv 2404.04656, eq. 8), without the weights for prompts of other kinds (section 4.2).

    Args:
        desirable_weight: what a good answer counts.
        undesirable_weight: what another one counts.
    """
    return labelled(-logsigmoid(beta * answers.shifted), answers, desirable_weight, undesirable_weight)


def shift(answers: Answers) -> Tensor:
    """d, halfway between the mean log-ratios of the step's good and of its other answers; of one kind alone that one's mean. [A]
    times the same number. The authors take a running mean over steps."""
    ratio = answers.ratio.double()
    means = [ratio[among].mean() for among in (answers.good, ~answers.good) if bool(among.any())]
    return torch.stack(means).mean().to(answers.policy.dtype).expand(len(ratio))


LOSS = PreferenceLoss(bco, needs_reference=True, unpaired=True, over_step=OverStep(shift, "shift"))
