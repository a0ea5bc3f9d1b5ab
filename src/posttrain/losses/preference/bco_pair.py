"""Binary classification of both answers of a pair, each by itself."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss


def bco_pair(pairs: Pairs, *, beta: float) -> Tensor:
    """-log sigma(r_w) - log sigma(-r_l), r beta times the log-ratio: [P] (Jung et al. 2024, arXiv 2404.04656, eq. 6, without the
    shift of rewards).

    It bounds the loss of `sigmoid` from above: sigma(a) sigma(b) < sigma(a + b).
    """
    rewards = beta * pairs.ratio
    return -logsigmoid(rewards[0::2]) - logsigmoid(-rewards[1::2])


LOSS = PreferenceLoss(bco_pair, needs_reference=True)
