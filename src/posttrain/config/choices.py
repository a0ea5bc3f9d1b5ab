"""Choices that a config has and other code carries out: each is written down here, once. Imports no torch."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.registry import Registry

Schedule = Literal["constant", "linear", "cosine"]  # of the learning rate
KlEstimator = Literal["k1", "k2", "k3"]
GroupAdvantage = Literal["grpo", "rloo"]  # against the other answers to the same prompt
Advantage = Literal["gae", GroupAdvantage]

Kernels = Literal["auto", "reference"]

# a file a loss, a `posttrain.losses.pairs.PreferenceLoss` in each
PREFERENCE_LOSSES: Registry[Any] = Registry(
    "posttrain.losses.preference", "posttrain.preference_losses", "LOSS", "preference loss"
)
