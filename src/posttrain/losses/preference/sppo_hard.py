"""Self-play preference optimisation, with a chosen answer that wins for certain."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss


def sppo_hard(pairs: Pairs, *, beta: float) -> Tensor:
    """(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2, l the log-ratios: [P] (Wu et al. 2024, arXiv 2405.00675, eq. 4.7, with
    win rates of 1 and 0)."""
    target = 0.5 / beta
    return (pairs.ratio[0::2] - target) ** 2 + (pairs.ratio[1::2] + target) ** 2


LOSS = PreferenceLoss(sppo_hard, needs_reference=True)
