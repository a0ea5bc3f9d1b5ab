"""Odds ratio preference optimisation: fine-tuning and preference in one stage, without a reference."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss, chosen_nll, margins


def orpo(pairs: Pairs, *, beta: float) -> Tensor:
    """NLL(y_w) - beta log sigma(log odds(y_w) - log odds(y_l)), odds = p / (1 - p), log p the mean log-prob of an answer's token:
    [P] (Hong et al. 2024, arXiv 2403.07691, eq. 6, where beta is called lambda).

    The NLL is of a token of the chosen answer; TRL takes prompt and answer together.
    """
    mean = pairs.policy / pairs.lengths
    log_odds = mean - torch.log(-torch.expm1(mean.clamp(max=-1e-7)))  # log(1 - p), exact where p is near 1
    return chosen_nll(pairs) - beta * logsigmoid(margins(log_odds))


LOSS = PreferenceLoss(orpo, needs_reference=False, per_token=True)
