"""Choices that a config has and other code carries out: each is written down here, once. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.registry import Registry

Schedule = Literal["constant", "linear", "cosine", "wsd"]  # of the learning rate
RATE_GROUPS = ("embeddings", "head", "experts")  # what `optim.lr_groups` knows by name
KlEstimator = Literal["k1", "k2", "k3"]
GroupAdvantage = Literal["grpo", "rloo"]  # against the other answers to the same prompt
Advantage = Literal["gae", GroupAdvantage]
AdvantageScale = Literal["group", "step", "none"]  # whose deviation grpo divides by
KlPlace = Literal["reward", "loss"]
Correction = Literal["none", "truncate", "mask"]  # of samples that another policy drew than the one that is trained

Kernels = Literal["auto", "reference"]

# a file an optimizer
OPTIMIZERS: Registry[Any] = Registry(
    "posttrain.training.optimizers", "posttrain.optimizers", "OPTIMIZER", "optimizer",
    of="posttrain.training.optimizers._kind:OptimizerKind",
)  # fmt: skip
# a file a loss
TOKEN_LOSSES: Registry[Any] = Registry(
    "posttrain.losses.token", "posttrain.token_losses", "LOSS", "token loss", of="posttrain.losses.tokens:TokenLoss"
)
PREFERENCE_LOSSES: Registry[Any] = Registry(
    "posttrain.losses.preference", "posttrain.preference_losses", "LOSS", "preference loss",
    of="posttrain.losses.pairs:PreferenceLoss",
)  # fmt: skip
POLICY_LOSSES: Registry[Any] = Registry(
    "posttrain.losses.policy", "posttrain.policy_losses", "LOSS", "policy loss", of="posttrain.losses.surrogates:PolicyLoss"
)
# a file a reward, a class in each whose arguments are its options and whose instances are reward functions
REWARDS: Registry[Any] = Registry(
    "posttrain.rewards.builtin", "posttrain.rewards", "REWARD", "reward", of="collections.abc:Callable"
)


def is_reward_function(name: str) -> bool:
    """Is it a reward's name, built in or module:name, and no run's?"""
    return ":" in name or name in REWARDS.names()
