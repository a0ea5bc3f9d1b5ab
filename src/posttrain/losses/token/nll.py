"""The plain loss of supervised fine-tuning."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.tokens import TokenLoss


def nll(logps: Tensor) -> Tensor:
    """-log p(x_t | x_<t) (Ouyang et al. 2022, arXiv 2203.02155)."""
    return -logps


LOSS = TokenLoss(nll, smooths=True)
