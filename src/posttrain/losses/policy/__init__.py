"""Losses of policy optimisation. Each module of this folder is one, and its file's name is what `ppo.loss` calls it; an installed
package adds others by entry points of the group `posttrain.policy_losses`."""

from __future__ import annotations

from torch import Tensor

from posttrain.batch import LossOutput
from posttrain.config.choices import POLICY_LOSSES
from posttrain.losses.advantages import kl_estimate
from posttrain.losses.surrogates import PolicyLoss, Sampled


def policy_loss(
    name: str, sampled: Sampled, weight: Tensor, *, low: float, high: float, importance: Tensor | None = None
) -> LossOutput:
    """Sum over N tokens of weight times the loss called `name`, and what is reported of any of them.

    Args:
        weight: of each token, float32 [N] (`PolicyLoss.weights`); 0 for one that does not count.
        low, high: the range of the ratio of new to old probability is 1 - low to 1 + high.
        importance: of each token, [N], where another policy has sampled (`surrogates.importance`).
    """
    loss: PolicyLoss = POLICY_LOSSES.get(name)
    losses, ratio = loss.per_token(sampled, low=low, high=high)
    if importance is not None:
        losses = losses * importance
    total, counts = (weight * losses).sum(), (weight > 0).float()
    ratio = ratio.detach()
    outside = ((ratio > 1 + high) | (ratio < 1 - low)).float()
    moved = kl_estimate(sampled.old, sampled.logps.detach(), "k3")
    return LossOutput(
        total,
        {
            "loss": (total.detach(), weight.sum()),
            "clip_fraction": ((counts * outside).sum(), counts.sum()),
            "update_kl": ((counts * moved).sum(), counts.sum()),
        },
    )
