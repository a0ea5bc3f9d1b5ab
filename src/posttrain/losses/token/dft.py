"""Dynamic fine-tuning: what the model finds unlikely pulls less."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.tokens import TokenLoss


def dft(logps: Tensor) -> Tensor:
    """-sg(p) log p, sg: no gradient through it (Wu et al. 2025, arXiv 2508.05629, eq. 9). Its gradient is that of -p."""
    return -logps.detach().exp() * logps


LOSS = TokenLoss(dft)
