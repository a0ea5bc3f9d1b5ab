"""The loss of clipped importance sampling policy optimisation."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.surrogates import PolicyLoss, Sampled


def cispo(sampled: Sampled, *, low: float, high: float) -> tuple[Tensor, Tensor]:
    """-min(rho, 1 + high) A log p, the ratio without gradient (MiniMax 2025, arXiv 2506.13585, eq. 4, which leaves out the lower
    bound in its experiments, too). No token loses its gradient, as the clipped ones of PPO do; `low` is not used.
    """
    ratio = sampled.ratio.detach()
    return -ratio.clamp(max=1 + high) * sampled.advantages * sampled.logps, ratio


LOSS = PolicyLoss(cispo, mean="token")
