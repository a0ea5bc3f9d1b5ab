"""The loss of direct preference optimisation on log-ratios per token."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, margins, smoothed


def sigmoid_norm(pairs: Pairs, *, beta: float, label_smoothing: float) -> Tensor:
    """`sigmoid` with each log-ratio divided by its answer's length, so that long answers weigh no more: [P].

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, section 5.1.2, who take a beta of 5: margins per token are small.
    """
    return smoothed(margins(pairs.ratio / pairs.lengths), beta, label_smoothing)


LOSS = PreferenceLoss(sigmoid_norm, needs_reference=True, smooths_labels=True, beta=5.0)
