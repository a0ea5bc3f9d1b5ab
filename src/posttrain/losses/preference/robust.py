"""Direct preference optimisation that is unbiased where a known share of the labels is swapped."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def robust(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """(-(1-e) log sigma(beta h) + e log sigma(-beta h)) / (1 - 2e), h the chosen log-ratio minus the rejected one: [P].

    Chowdhury, Kini, Natarajan 2024, arXiv 2403.00409, eq. 12. With labels of which a share e is swapped its mean is that of
    `sigmoid` on the right ones. It has no lower bound.
    """
    h = beta * margins(pairs.ratio)
    return (-(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)) / (1 - 2 * label_smoothing)


LOSS = PreferenceLoss(robust, needs_reference=True, smooths_labels=True, label_smoothing=0.1)
