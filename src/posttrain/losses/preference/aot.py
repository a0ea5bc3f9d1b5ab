"""Alignment via optimal transport: the whole distribution of margins, not each pair's own."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.losses.pairs import OverStep, Pairs, PreferenceLoss, margins, smoothed


def aot(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta (m - m')), m a pair's margin under the policy, m' the margin of the same rank under the reference: [P]
    (Melnyk et al. 2024, arXiv 2406.05882, eq. 9 and algorithm 1).

    Ranks are among the pairs of a step, each of which counts as one. TRL's are among those of a micro-batch. With one pair in a
    step it is `sigmoid`.
    """
    rivals = same_rank(pairs) if pairs.step is None else pairs.step
    return smoothed(margins(pairs.policy) - rivals, beta, label_smoothing)


def same_rank(pairs: Pairs) -> Tensor:
    """For each pair the reference margin whose rank is that of the pair's policy margin, without gradient: [P]."""
    assert pairs.reference is not None
    policy, reference = margins(pairs.policy.detach()), margins(pairs.reference)
    return torch.empty_like(reference).scatter(0, policy.argsort(stable=True), reference.sort().values)


LOSS = PreferenceLoss(aot, needs_reference=True, smooths_labels=True, over_step=OverStep(same_rank))
