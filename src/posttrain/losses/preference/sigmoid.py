"""The loss of direct preference optimisation."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins, smoothed


def sigmoid(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """-log sigma(beta h), h the chosen log-ratio minus the rejected one: [P] (Rafailov et al. 2023, arXiv 2305.18290, eq. 7).

    With label smoothing e it is -(1-e) log sigma(beta h) - e log sigma(-beta h): cDPO (Mitchell 2023).
    """
    return smoothed(margins(pairs.ratio), beta, label_smoothing)


LOSS = PreferenceLoss(sigmoid, needs_reference=True, smooths_labels=True)
