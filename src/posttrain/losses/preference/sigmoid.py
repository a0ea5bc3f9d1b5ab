"""The loss of direct preference optimisation."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta h), h the chosen log-ratio minus the rejected one: [P] (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With label smoothing e it is -(1-e) log sigma(beta h) - e log sigma(-beta h): cDPO (Mitchell 2023).
    """
    return smoothed(margins(pairs.ratio), beta, label_smoothing)


def smoothed(margin: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta margin), with a share of the pairs taken to be the wrong way round."""
    return -(1 - label_smoothing) * logsigmoid(beta * margin) - label_smoothing * logsigmoid(-beta * margin)


LOSS = PreferenceLoss(sigmoid, needs_reference=True, smooths_labels=True)
