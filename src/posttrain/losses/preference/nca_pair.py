"""Noise contrastive alignment on pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss


def nca_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """-log sigma(r_w) - (log sigma(-r_w) + log sigma(-r_l)) / 2, r beta times the log-ratio: [P] (Chen et al. 2024, arXiv
    2402.05369, table 2, K = 2).

    The chosen answer's own ratio is pulled up, not the difference alone, so its likelihood falls less than with `sigmoid`.
    """
    rewards = beta * pairs.ratio
    chosen, rejected = rewards[0::2], rewards[1::2]
    return -logsigmoid(chosen) - 0.5 * (logsigmoid(-chosen) + logsigmoid(-rejected))


LOSS = PreferenceLoss(nca_pair, needs_reference=True)
