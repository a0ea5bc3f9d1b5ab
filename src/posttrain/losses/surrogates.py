"""What the losses of policy optimisation share: the sampled tokens, how a loss is averaged over them, and importance weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from posttrain.config.choices import Correction

Mean = Literal["token", "answer", "longest"]


@dataclass(frozen=True)
class Sampled:
    """N sampled tokens, whole answers one after another.

    Args:
        logps: by the policy under training, float32 [N], with gradient.
        old: by the policy as it was at the rollout, [N].
        advantages: [N].
        answer: int64 [N], which answer each token is of.
    """

    logps: Tensor
    old: Tensor
    advantages: Tensor
    answer: Tensor

    @property
    def ratio(self) -> Tensor:
        """New to old probability of each token, [N]."""
        return torch.exp(self.logps - self.old)

    def clipped(self, ratio: Tensor, low: float, high: float) -> Tensor:
        """-min(ratio A, clip(ratio, 1 - low, 1 + high) A), [N] (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
        return -torch.minimum(ratio * self.advantages, ratio.clamp(1 - low, 1 + high) * self.advantages)


@dataclass(frozen=True)
class PolicyLoss:
    """One loss of `ppo.loss`.

    Args:
        per_token: (sampled, *, low, high) -> the loss of each token and the ratio that the range 1 - low to 1 + high is of,
            both [N].
        mean: what the loss is the mean of. token: of all tokens alike; answer: of answers, each the mean of its tokens; longest:
            of answers, each the sum of its tokens over the most that an answer may have.
    """

    per_token: Callable[..., tuple[Tensor, Tensor]]
    mean: Mean

    def weights(self, lengths: Tensor, counted: Tensor, most: int) -> tuple[Tensor, Tensor]:
        """Of each answer the weight of its tokens, and its part of what the weighted sum is divided by: float32 [A] both.

        lengths: tokens of each answer; counted: bool, which answers count at all; most: tokens that an answer may have.
        """
        counts = counted.float()
        if self.mean == "token":
            return counts, counts * lengths
        return counts / (lengths if self.mean == "answer" else most), counts


def importance(old: Tensor, sampled: Tensor, kind: Correction, cap: float) -> Tensor:
    """By how much a token counts that was drawn with log-prob `sampled`, where the policy that is trained gave it `old`: [N].

    Their ratio makes the mean over the samples the policy's own. truncate: at most `cap` (Ionides 2008; Yao et al. 2025, "Your
    efficient RL framework secretly brings you off-policy RL training"); mask: 0 where it is more than `cap`, or less than 1 / cap
    (Ling Team 2025, arXiv 2510.18855, section 2.4.1).
    """
    if kind == "none":
        return torch.ones_like(old)
    ratio = torch.exp(old - sampled)
    if kind == "truncate":
        return ratio.clamp(max=cap)
    return torch.where((ratio <= cap) & (ratio >= 1 / cap), ratio, 0.0)
