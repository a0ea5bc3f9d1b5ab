"""A loss of sft: what the model knows already pulls less."""

from torch import Tensor

from posttrain.losses.tokens import TokenLoss


def focal(logps: Tensor) -> Tensor:
    """-(1 - p)^2 log p, by token (Lin et al. 2017, arXiv 1708.02002)."""
    return -((1 - logps.exp()) ** 2) * logps


LOSS = TokenLoss(focal)
