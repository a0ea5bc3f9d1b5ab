"""Losses on preference pairs. Each module of this folder is one, and its file's name is what `dpo.loss` calls it; an installed
package adds others by entry points of the group `posttrain.preference_losses`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from posttrain.batch import LossOutput
from posttrain.config.choices import PREFERENCE_LOSSES
from posttrain.errors import UserError, did_you_mean
from posttrain.losses.pairs import Pairs, PreferenceLoss, implicit_rewards, pair_metrics, weighted


def chosen_loss(name: str, label_smoothing: float, options: Mapping[str, Any]) -> PreferenceLoss:
    """The loss called `name`. Raises UserError where there is none, or where it does not have what is asked of it."""
    loss: PreferenceLoss = PREFERENCE_LOSSES.get(name)
    if label_smoothing and not loss.smooths_labels:
        raise UserError(f"dpo.label_smoothing: dpo.loss={name} has none; say dpo.label_smoothing=0")
    if unknown := next((option for option in options if option not in loss.options), None):
        has = f"has {', '.join(loss.options)}" if loss.options else "has no options of its own"
        raise UserError(f"dpo.options.{unknown}: dpo.loss={name} {has}{did_you_mean(unknown, loss.options)}")
    return loss


def preference_loss(
    name: str, pairs: Pairs, weight: Tensor, *, beta: float, label_smoothing: float, options: Mapping[str, Any]
) -> LossOutput:
    """Sum over P pairs of weight times the loss called `name`, and what is reported of any of them.

    Args:
        weight: of each pair, [P].
        beta: strength of the pull to the reference.
        label_smoothing: share of pairs that are taken to be the wrong way round, for a loss that smooths labels.
        options: of this loss alone, by keyword.
    """
    loss: PreferenceLoss = PREFERENCE_LOSSES.get(name)
    smoothing = {"label_smoothing": label_smoothing} if loss.smooths_labels else {}
    losses = loss.per_pair(pairs, beta=beta, **smoothing, **options)
    rewards, policy, count = implicit_rewards(pairs, beta), pairs.policy.detach(), float(len(losses))
    metrics = pair_metrics(rewards[0::2], rewards[1::2], "reward")
    logps = {"logp_chosen": (policy[0::2].sum(), count), "logp_rejected": (policy[1::2].sum(), count)}
    return weighted(losses, weight, metrics | logps)
