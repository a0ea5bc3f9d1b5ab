"""The weighted sum of several rewards, and what is learnt of it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.config.schema import RewardConfig
from posttrain.losses.advantages import whiten


def combined(scores: Sequence[Tensor], ended: Tensor, cfg: RewardConfig, lengths: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The weighted sum of several scores [A] each, and the shaped reward that is learnt from: whitened, clipped, and less the
    penalties for an answer without end (ended: bool [A]) and for a long one (lengths: tokens [A]).

    A score that is not a number does not apply to its answer, and adds nothing.
    """
    weights = cfg.weights or [1.0] * len(scores)
    if cfg.whiten == "each":
        scores = [_whitened(score) for score in scores]
    reward = torch.stack([weight * score.nan_to_num(0.0) for weight, score in zip(weights, scores, strict=True)]).sum(0)
    shaped_reward = whiten(reward) if cfg.whiten is True else reward
    shaped_reward = shaped_reward if cfg.clip is None else shaped_reward.clamp(-cfg.clip, cfg.clip)
    shaped_reward = shaped_reward - cfg.missing_eos_penalty * (~ended).float()
    if cfg.overlong is not None and lengths is not None:
        shaped_reward = shaped_reward - overlong(lengths, cfg.overlong[0], cfg.overlong[1])
    return reward, shaped_reward


def overlong(lengths: Tensor, soft: int, hard: int) -> Tensor:
    """What is taken off an answer of so many tokens: nothing up to `soft`, 1 from `hard` on, in a line between (Yu et al. 2025,
    arXiv 2503.14476, eq. 13)."""
    return ((lengths.float() - soft) / (hard - soft)).clamp(0.0, 1.0)


def unscored(scores: Sequence[Tensor]) -> Tensor:
    """bool [A]: the answers to which no score applies."""
    return torch.stack([score.isnan() for score in scores]).all(0)


def _whitened(score: Tensor) -> Tensor:
    found = score.clone()
    found[~score.isnan()] = whiten(score[~score.isnan()])
    return found


def best_and_worst(scores: Tensor) -> tuple[int, int] | None:
    """Places of the highest and the lowest of scores [A], the first of equals, which make a pair; None where no answer to which
    they apply is better than another."""
    best, worst = scores.nan_to_num(-torch.inf).argmax(), scores.nan_to_num(torch.inf).argmin()
    return (int(best), int(worst)) if bool(scores[best] > scores[worst]) else None
