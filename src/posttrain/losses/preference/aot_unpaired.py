"""Alignment via optimal transport without pairs: all chosen answers of a step against all rejected ones."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.pairs import OverStep, Pairs, PreferenceLoss, smoothed


def aot_unpaired(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta (c - l)), c the log-ratio of a chosen answer, l that of the rejected one of the same rank: [P] (Melnyk et
    al. 2024, arXiv 2406.05882, eq. 7 and algorithm 1, unpaired).

    Ranks are among the answers of a step; who is whose rival in the rows does not matter. TRL's are among those of a micro-batch.
    Either answer is held against the other's value before the step. So what stands for a pair is the mean of its two answers'
    losses, and the gradient is their sum, which is that of -log sigma(beta (c - l)) by both.
    """
    rival = rivals(pairs) if pairs.step is None else pairs.step
    ratio = pairs.ratio
    found = smoothed(ratio[0::2] - rival[:, 0], beta, label_smoothing) + smoothed(
        rival[:, 1] - ratio[1::2], beta, label_smoothing
    )
    return found - found.detach() / 2


def rivals(pairs: Pairs) -> Tensor:
    """For each pair the log-ratio of the rejected answer of its chosen one's rank, and that of the chosen answer of its rejected
    one's rank, without gradient: [P, 2]."""
    ratio = pairs.ratio.detach()
    chosen, rejected = ratio[0::2], ratio[1::2]
    return torch.stack([_at_its_rank(chosen, rejected), _at_its_rank(rejected, chosen)], 1)


def _at_its_rank(one: Tensor, other: Tensor) -> Tensor:
    return torch.empty_like(one).scatter(0, one.argsort(stable=True), other.sort().values)


LOSS = PreferenceLoss(aot_unpaired, needs_reference=True, smooths_labels=True, over_step=OverStep(rivals))
