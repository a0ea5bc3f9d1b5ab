"""The hinge loss of sequence likelihood calibration (SLiC), on log-ratios."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins


def hinge(pairs: Pairs, *, beta: float) -> Tensor:
    """max(0, 1 - beta h), h the chosen log-ratio minus the rejected one: [P] (Zhao et al. 2023, arXiv 2305.10425, eq. 1; on
    log-ratios Liu et al. 2023, arXiv 2309.06657, table 1).

    A pair whose margin is 1 / beta or more teaches nothing any more.
    """
    return (1 - beta * margins(pairs.ratio)).clamp(min=0)


LOSS = PreferenceLoss(hinge, needs_reference=True)
