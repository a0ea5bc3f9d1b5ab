"""The loss of proximal policy optimisation."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.surrogates import PolicyLoss, Sampled


def ppo(sampled: Sampled, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(rho A, clip(rho, 1 - low, 1 + high) A), rho the ratio of a token (Schulman et al. 2017, arXiv 1707.06347, eq. 7).

    The mean is over tokens, as in Ouyang et al. 2022 (arXiv 2203.02155).
    """
    return sampled.clipped(sampled.ratio, low, high), sampled.ratio


LOSS = PolicyLoss(ppo, mean="token")
