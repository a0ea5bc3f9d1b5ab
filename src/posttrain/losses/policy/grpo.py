"""The loss of group relative policy optimisation."""

from __future__ import annotations

from posttrain.losses.policy.ppo import ppo
from posttrain.losses.surrogates import PolicyLoss

# PPO's, but an answer counts as one, however long it is: the mean over its tokens, then over answers (Shao et al. 2024, arXiv
# 2402.03300, eq. 3)
LOSS = PolicyLoss(ppo, mean="answer")
