"""What PPO's updates train on, and their loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.losses import policy as losses
from posttrain.rewards import combined
from posttrain.stages.ppo.config import Ppo
from posttrain.stages.ppo.rollout import Rollout, figures_of, sampling_gap

Figures = dict[str, float]


def ppo_batches(cfg: Ppo, rollout: Rollout, kl_coef: float) -> tuple[list[list[PackedBatch]], Figures]:
    """For each pack the policy's part and (with gae) the value model's; and the figures of the step."""
    ppo, mask = cfg.ppo, rollout.mask
    reward, shaped_reward = combined(rollout.scores, rollout.ended, cfg.reward)
    kl = losses.kl_estimate(rollout.old, rollout.reference, ppo.kl_estimator) * mask
    figures = figures_of(rollout, reward) | {"kl_coef": kl_coef}
    figures["shaped_reward"] = float((shaped_reward - kl_coef * kl.sum(1)).mean())
    figures["sampling_gap"] = sampling_gap(rollout)
    if (values := rollout.values) is not None:
        rewards = -kl_coef * kl
        rewards[torch.arange(len(mask)), rollout.lengths - 1] += shaped_reward
        advantages, returns = losses.gae(rewards, values, mask, ppo.gamma, ppo.lam)
        figures["explained_variance"] = losses.explained_variance(values[mask], returns[mask])
        if ppo.whiten:
            advantages[mask] = losses.whiten(advantages[mask])
        learning = {"values": rollout.split(values), "returns": rollout.split(returns)}
    else:
        assert ppo.advantage != "gae"
        whole = losses.group_advantages(shaped_reward - kl_coef * kl.sum(1), ppo.samples, ppo.advantage)
        advantages, learning = whole[:, None] * mask, {}
    acting = {"old": rollout.split(rollout.old), "advantages": rollout.split(advantages)}
    return [_parts(pack, i, [acting, learning] if learning else [acting]) for i, pack in enumerate(rollout.packs)], figures


def _parts(pack: PackedBatch, number: int, extras: list[dict[str, tuple[Tensor, ...]]]) -> list[PackedBatch]:
    """The same tokens once for each of `extras`. A token of both parts is one token: their denominators add up to it."""
    share = pack.loss_denominator / len(extras)
    named = [{name: values[number] for name, values in extra.items()} for extra in extras]
    return [replace(pack, loss_denominator=share, extra=extra) for extra in named]


def ppo_loss(cfg: Ppo, module: nn.Module, batch: PackedBatch) -> LossOutput:
    """Of one part: the policy's, or the value model's on the same tokens. Apart, each is done with before the other's adapters
    are set, and only one graph is in memory."""
    ppo, extra = cfg.ppo, batch.extra
    if "returns" in extra:
        output = losses.value_loss(module(batch, "value"), extra["values"], extra["returns"], clip=ppo.value_clip)
        return replace(output, total=ppo.value_coef * output.total)
    spread = bool(ppo.entropy_coef)
    found = module(batch, "policy", cfg.rollout.temperature, with_entropy=spread)
    output = losses.policy_loss(found[0] if spread else found, extra["old"], extra["advantages"], clip=ppo.clip)
    return replace(output, total=output.total - ppo.entropy_coef * found[1].sum()) if spread else output
