"""Simple preference optimisation: mean log-probs and a margin to win by, without a reference."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins, smoothed


def simpo(pairs: Pairs, *, beta: float, label_smoothing: float, gamma: float = 1.0) -> Tensor:
    """-log sigma(beta h - gamma), h the mean log-prob of a chosen token minus that of a rejected one: [P] (Meng et al. 2024,
    arXiv 2405.14734, eq. 6).

    Args:
        gamma: by how much a chosen answer should win; the authors take about half of beta.
    """
    return smoothed(margins(pairs.policy / pairs.lengths) - gamma / beta, beta, label_smoothing)


LOSS = PreferenceLoss(simpo, needs_reference=False, smooths_labels=True, beta=2.0, per_token=True)
