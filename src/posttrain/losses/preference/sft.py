"""The likelihood of the chosen answer: to be added to others, as the NLL term of RPO."""

from __future__ import annotations

from torch import Tensor

from posttrain.losses.pairs import Pairs, PreferenceLoss, chosen_nll


def sft(pairs: Pairs) -> Tensor:
    """-log p of a token of the chosen answer, the mean over the answer's tokens: [P] (Pang et al. 2024, arXiv 2404.19733, eq. 2).

    Each pair counts alike. TRL takes the mean over the tokens of a micro-batch, so there long answers count more, and as much
    more as the others in the batch are short.
    """
    return chosen_nll(pairs)


LOSS = PreferenceLoss(sft, needs_reference=False, beta=None, per_token=True)
