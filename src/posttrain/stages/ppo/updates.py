"""What PPO's updates train on, and their loss."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.config.choices import POLICY_LOSSES
from posttrain.losses import advantages as losses
from posttrain.losses.policy import policy_loss
from posttrain.losses.surrogates import PolicyLoss, Sampled, importance
from posttrain.rewards import combined
from posttrain.stages.ppo.config import Ppo
from posttrain.stages.ppo.rollout import Rollout, figures_of, sampling_gap

Figures = dict[str, float]
Tables = dict[str, tuple[Tensor, ...]]  # by name, of each pack


def ppo_batches(cfg: Ppo, rollout: Rollout, kl_coef: float) -> tuple[list[list[PackedBatch]], Figures]:
    """For each pack the policy's part and (with gae) the value model's; and the figures of the step."""
    ppo, mask = cfg.ppo, rollout.mask
    reward, shaped_reward = combined(list(rollout.scores.values()), rollout.ended, cfg.reward, rollout.lengths)
    figures = figures_of(rollout, reward) | {"kl_coef": kl_coef, "sampling_gap": sampling_gap(rollout)}
    taken_off = kl_coef if ppo.kl_in == "reward" else 0.0
    kl = losses.kl_estimate(rollout.old, rollout.reference, ppo.kl_estimator) * mask
    figures["shaped_reward"] = float((shaped_reward - taken_off * kl.sum(1)).mean())
    if (values := rollout.values) is not None:
        rewards = -taken_off * kl
        rewards[torch.arange(len(mask)), rollout.lengths - 1] += shaped_reward
        advantages, returns = losses.gae(rewards, values, mask, ppo.gamma, ppo.lam)
        figures["explained_variance"] = losses.explained_variance(values[mask], returns[mask])
        if ppo.whiten:
            advantages[mask] = losses.whiten(advantages[mask])
        learning = {"values": rollout.split(values), "returns": rollout.split(returns)}
    else:
        assert ppo.advantage != "gae"
        scores = shaped_reward - taken_off * kl.sum(1)
        whole = losses.group_advantages(scores, ppo.samples, ppo.advantage, ppo.scale)
        figures["informative"] = float(losses.told_apart(scores, ppo.samples).float().mean())
        advantages, learning = whole[:, None] * mask, {}
    acting = _acting(cfg, rollout, kl_coef) | {"advantages": rollout.split(advantages)}
    weights, counts = _weights(cfg, rollout)
    parts = [each | {"share": rollout.split(weights)} for each in ([acting, learning] if learning else [acting])]
    return [_parts(pack, i, count, parts) for i, (pack, count) in enumerate(zip(rollout.packs, counts, strict=True))], figures


def _acting(cfg: Ppo, rollout: Rollout, kl_coef: float) -> Tables:
    """What the policy's loss reads beside the advantages."""
    found = {"old": rollout.split(rollout.old)}
    if cfg.ppo.kl_in == "loss" and kl_coef:
        found["reference_logps"] = rollout.split(rollout.reference)
    if cfg.rollout.correction != "none":
        by_whom = importance(rollout.old, rollout.sampled, cfg.rollout.correction, cfg.rollout.correction_cap)
        found["importance"] = rollout.split(by_whom)
    return found


def _weights(cfg: Ppo, rollout: Rollout) -> tuple[Tensor, list[float]]:
    """The weight of each token in the loss [A, T], and what each of this process's packs counts for."""
    loss: PolicyLoss = POLICY_LOSSES.get(cfg.ppo.loss)
    counted = rollout.ended if cfg.ppo.mask_truncated else torch.ones_like(rollout.ended)
    weights, counts = loss.weights(rollout.lengths.float(), counted, cfg.rollout.max_new_tokens)
    by_pack: tuple[Tensor, ...] = torch.split(counts[rollout.own], [pack.num_answers for pack in rollout.packs])
    # a pack that goes along for another process's sake counts for nothing
    found = [float(each.sum()) if pack.loss_denominator else 0.0 for each, pack in zip(by_pack, rollout.packs, strict=True)]
    return weights[:, None] * rollout.mask, found


def _parts(pack: PackedBatch, number: int, count: float, extras: list[Tables]) -> list[PackedBatch]:
    """The same tokens once for each of `extras`. A token of both parts is one token: their denominators add up to `count`."""
    named = [{name: values[number] for name, values in extra.items()} for extra in extras]
    return [replace(pack, loss_denominator=count / len(extras), extra=extra) for extra in named]


def ppo_loss(cfg: Ppo, module: nn.Module, batch: PackedBatch, kl_coef: float) -> LossOutput:
    """Of one part: the policy's, or the value model's on the same tokens. Apart, each is done with before the other's adapters
    are set, and only one graph is in memory."""
    ppo, extra = cfg.ppo, batch.extra
    if "returns" in extra:
        output = losses.value_loss(
            module(batch, "value"), extra["values"], extra["returns"], clip=ppo.value_clip, weight=extra["share"]
        )
        return replace(output, total=ppo.value_coef * output.total)
    spread, weight = bool(ppo.entropy_coef), extra["share"]
    found = module(batch, "policy", cfg.rollout.temperature, with_entropy=spread)
    logps = found[0] if spread else found
    sampled = Sampled(logps, extra["old"], extra["advantages"], batch.sequence_id)
    output = policy_loss(ppo.loss, sampled, weight, low=ppo.clip, high=ppo.clip_high, importance=extra.get("importance"))
    total, metrics = output.total, output.metrics
    if "reference_logps" in extra:
        kl = (weight * losses.kl_estimate(logps, extra["reference_logps"], ppo.kl_estimator)).sum()
        total, metrics = total + kl_coef * kl, metrics | {"kl_loss": (kl_coef * kl.detach(), weight.sum())}
    return LossOutput(total - ppo.entropy_coef * (weight * found[1]).sum() if spread else total, metrics)
