"""Next-token loss on weighted tokens: continued pre-training and supervised fine-tuning."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from posttrain.batch import LossOutput, Metrics


def token_loss(logps: Tensor, weight: Tensor) -> LossOutput:
    """Sum of -w_t log p(x_t | x_<t) over N weighted tokens (Ouyang et al. 2022, arXiv 2203.02155).

    logps, weight: float32 [N]. The mean that is optimised is this sum over the sum of the step's weights.
    """
    total = -(weight * logps).sum()
    return LossOutput(total, {"loss": (total.detach(), weight.sum())})


@dataclass(frozen=True)
class TokenLoss:
    """One loss of `sft.loss`.

    Args:
        per_token: log-probs of the tokens [N] -> the loss of each, [N].
        smooths: `sft.label_smoothing` goes with it.
    """

    per_token: Callable[[Tensor], Tensor]
    smooths: bool = False


def shaped_token_loss(
    loss: TokenLoss, logps: Tensor, weight: Tensor, smoothing: float = 0.0, z_loss: float = 0.0, spread: Tensor | None = None
) -> LossOutput:
    """Sum over N tokens of w_t [(1 - s) l_t - s mean_v log p(v | x_<t) + z (log Z_t)^2], l_t by `loss`.

    s: label smoothing (Szegedy et al. 2016, arXiv 1512.00567, section 7). z: z-loss (Chowdhery et al. 2022, arXiv 2204.02311,
    section 5). spread: [2, N], the mean log-prob of all words and log Z, where s or z is not zero. Beside the loss, `nll` is the
    plain one.
    """
    losses = loss.per_token(logps)
    if spread is not None and smoothing:
        losses = (1 - smoothing) * losses - smoothing * spread[0]
    count = weight.sum()
    metrics: Metrics = {"nll": ((weight * -logps).sum().detach(), count)}
    if spread is not None and z_loss:
        losses = losses + z_loss * spread[1] ** 2
        metrics["log_z"] = ((weight * spread[1]).sum().detach(), count)
    total = (weight * losses).sum()
    return LossOutput(total, {"loss": (total.detach(), count), **metrics})


def answer_sums(values: Tensor, owner: Tensor, num_answers: int) -> Tensor:
    """Sum per-token `values` [N] into their answers: [num_answers]. In the same order each time, on a GPU too."""
    sums = torch.zeros(num_answers, dtype=values.dtype, device=values.device)
    if values.device.type == "cpu":
        return sums.index_add(0, owner, values)
    # sorted by owner first, where CUDA's index_add adds as its threads happen to come
    return sums.index_put((owner,), values, accumulate=True)
