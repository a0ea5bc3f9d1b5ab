"""What sampled answers have earned: KL, the advantage of each token (GAE, GRPO, RLOO), and what values learn of them.

Tables are [A, T]: a row an answer, a column a token, `mask` False past an answer's end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.batch import LossOutput
from posttrain.config.choices import AdvantageScale, GroupAdvantage, KlEstimator


def kl_estimate(policy: Tensor, reference: Tensor, kind: KlEstimator) -> Tensor:
    """KL(policy || reference) at each sampled token, from its two log-probs (Schulman 2020, "Approximating KL divergence").

    With d = policy - reference: k1 = d, unbiased, of either sign; k2 = d^2 / 2, biased, of low variance; k3 = exp(-d) - 1 + d,
    unbiased and never negative.
    """
    d = policy - reference
    if kind == "k1":
        return d
    return d**2 / 2 if kind == "k2" else torch.expm1(-d) + d


def gae(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantages and the returns that values learn, both [A, T] (Schulman et al. 2015, arXiv 1506.02438, eq. 16).

    After an answer's last token the value is zero. With gamma = lam = 1 the advantage is R - V, R being the rewards to come.
    """
    advantages = torch.zeros_like(values)
    carried = next_value = torch.zeros_like(values[:, 0])
    for t in reversed(range(values.shape[1])):
        inside = mask[:, t]
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        carried = torch.where(inside, delta + gamma * lam * carried, 0.0)
        next_value = torch.where(inside, values[:, t], 0.0)
        advantages[:, t] = carried
    return advantages, (advantages + values) * mask


def group_advantages(scores: Tensor, size: int, kind: GroupAdvantage, scale: AdvantageScale = "group") -> Tensor:
    """How much better an answer is than the others to its prompt: [A] -> [A]; answers k*size to (k+1)*size share a prompt.

    grpo  (r - mean) / (std + 1e-4) of the group (Shao et al. 2024, arXiv 2402.03300, section 4.1.2). scale: whose deviation it is
          divided by, the group's, that of all of the step (Liu et al. 2025, arXiv 2508.08221), or none (Dr. GRPO: Liu et al.
          2025, arXiv 2503.20783, section 3.2)
    rloo  r - the mean of the group's other answers (Ahmadian et al. 2024, arXiv 2402.14740, eq. 8)

    Where all of a group got the same, advantages are exactly 0: what rounding leaves of r - mean would be blown up.
    """
    groups = scores.view(-1, size)
    centred = torch.where(told_apart(scores, size)[:, None], groups - groups.mean(1, keepdim=True), 0.0)
    if kind == "rloo":
        return (centred * size / (size - 1)).view(-1)
    if scale == "none":
        return centred.reshape(-1)
    deviation = groups.std(1, keepdim=True) if scale == "group" else scores.std()
    return (centred / (deviation + 1e-4)).view(-1)


def told_apart(scores: Tensor, size: int) -> Tensor:
    """bool [A / size]: the groups whose answers did not all get the same, the only ones that teach something."""
    groups = scores.view(-1, size)
    return groups.amax(1) > groups.amin(1)


def whiten(values: Tensor) -> Tensor:
    """Mean 0 and variance 1 over all of `values`; equal ones become 0, exactly."""
    if not len(values) or values.max() == values.min():
        return torch.zeros_like(values)
    centred = values - values.mean()
    return centred / (centred.pow(2).mean().sqrt() + 1e-8)


def value_loss(values: Tensor, old: Tensor, returns: Tensor, *, clip: float | None, weight: Tensor) -> LossOutput:
    """Sum over N tokens of weight times max((v - R)^2, (v_old + clip(v - v_old, -clip, clip) - R)^2) / 2, or without `clip` of
    the first."""
    losses = (values - returns) ** 2
    if clip is not None:
        losses = torch.maximum(losses, (old + (values - old).clamp(-clip, clip) - returns) ** 2)
    total = (weight * losses).sum() / 2
    return LossOutput(total, {"value_loss": (total.detach(), weight.sum())})


def explained_variance(values: Tensor, returns: Tensor) -> float:
    """1 - Var(R - V) / Var(R): 1 where values foretell the returns, 0 where a constant would do as well, below 0 where worse."""
    variance = returns.var(correction=0)
    return float(1 - (returns - values).var(correction=0) / variance) if variance > 0 else 0.0


def adapted(coef: float, kl: float, target: float, rate: float) -> float:
    """The KL penalty after a step whose answers lay `kl` from the reference: up to `rate` higher or lower.

    A proportional controller on the relative error, as Ziegler et al. 2019 (arXiv 1909.08593, section 2.2), cut at +-1.
    """
    return coef * (1 + rate * min(max(kl / target - 1, -1.0), 1.0))
