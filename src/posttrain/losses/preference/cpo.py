"""Contrastive preference optimisation: DPO with a uniform reference, and the likelihood of the chosen answer."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, chosen_nll, margins, smoothed


def cpo(pairs: Pairs, *, beta: float, label_smoothing: float, alpha: float = 1.0) -> Tensor:
    """-log sigma(beta (log p(y_w) - log p(y_l))) + alpha NLL(y_w): [P] (Xu et al. 2024, arXiv 2401.08417, eq. 5).

    The NLL is of a token, as in the authors' code; the paper writes that of the whole answer.

    Args:
        alpha: weight of the likelihood of the chosen answer.
    """
    return smoothed(margins(pairs.policy), beta, label_smoothing) + alpha * chosen_nll(pairs)


LOSS = PreferenceLoss(cpo, needs_reference=False, smooths_labels=True)
