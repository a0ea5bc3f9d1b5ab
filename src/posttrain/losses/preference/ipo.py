"""Identity preference optimisation."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def ipo(pairs: Pairs, *, beta: float) -> Tensor:
    """(h - 1 / (2 beta))^2, h the margin of per-token log-ratios: [P] (Azar et al. 2023, arXiv 2310.12036, eq. 17).

    The margin is pulled to 1 / (2 beta) and not beyond. The mean over tokens is the authors' own reading of their paper, as in
    TRL. There are no labels to smooth.
    """
    return (margins(pairs.ratio / pairs.lengths) - 1 / (2 * beta)) ** 2


LOSS = PreferenceLoss(ipo, needs_reference=True)
