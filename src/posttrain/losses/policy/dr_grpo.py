"""The loss of "GRPO done right"."""

from __future__ import annotations

from posttrain.losses.policy.ppo import ppo
from posttrain.losses.surrogates import PolicyLoss

# PPO's, summed over an answer's tokens and divided by the most that an answer may have: a long wrong answer is not punished less
# for each token than a short one, as GRPO does (Liu et al. 2025, arXiv 2503.20783, section 3.1 and listing 1)
LOSS = PolicyLoss(ppo, mean="longest")
