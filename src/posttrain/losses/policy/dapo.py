"""The loss of decoupled clip and dynamic sampling policy optimisation."""

from __future__ import annotations

from posttrain.losses.policy.ppo import ppo
from posttrain.losses.surrogates import PolicyLoss

# PPO's, with all tokens of a step alike, and a range of its own upwards, `ppo.clip_high`, in which unlikely tokens may become
# likely (Yu et al. 2025, arXiv 2503.14476, eq. 8)
LOSS = PolicyLoss(ppo, mean="token")
