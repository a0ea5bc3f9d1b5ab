"""Balance of experts (Fedus et al. 2021, arXiv 2101.03961): a mixture whose router prefers a few experts wastes the others."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def router_balance(layers: Sequence[Tensor], top_k: int) -> tuple[Tensor, Tensor]:
    """The auxiliary loss E * sum_e f_e P_e (eq. 4-6), and the load E * max_e f_e / k, both scalars.

    layers: each router's logits [tokens, E]. f_e: experts e among the k best, a token; P_e: its mean probability. The loss takes
    the tokens of all layers together, as transformers does, and is k where all experts are taken alike. The load is the mean over
    layers, without gradient: 1 where they are, E / k where all tokens take the same.
    """
    experts = layers[0].shape[-1]
    probs = [logits.float().softmax(-1) for logits in layers]
    taken = torch.stack([_taken(each, top_k) for each in probs])
    mean = torch.cat(probs).mean(0)
    loss = experts * (taken.mean(0) * mean).sum()
    return loss, experts * taken.amax(-1).mean() / top_k


def _taken(probs: Tensor, top_k: int) -> Tensor:
    """[E]: how many of a token's k choices fall on each expert, over all tokens."""
    chosen = probs.detach().topk(top_k, dim=-1).indices.flatten()
    counts = torch.zeros(probs.shape[-1], device=probs.device).index_add_(0, chosen, torch.ones(len(chosen), device=probs.device))
    return counts / len(probs)
