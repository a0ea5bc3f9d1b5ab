"""Next-token loss on weighted tokens: continued pre-training and supervised fine-tuning."""

from __future__ import annotations

import torch
from torch import Tensor

from posttrain.batch import LossOutput


def token_loss(logps: Tensor, weight: Tensor) -> LossOutput:
    """Sum of -w_t log p(x_t | x_<t) over N weighted tokens (Ouyang et al. 2022, arXiv 2203.02155).

    logps, weight: float32 [N]. The mean that is optimised is this sum over the sum of the step's weights.
    """
    total = -(weight * logps).sum()
    return LossOutput(total, {"loss": (total.detach(), weight.sum())})


def answer_sums(values: Tensor, owner: Tensor, num_answers: int) -> Tensor:
    """Sum per-token `values` [N] into their answers: [num_answers]. In the same order each time, on a GPU too."""
    sums = torch.zeros(num_answers, dtype=values.dtype, device=values.device)
    if values.device.type == "cpu":
        return sums.index_add(0, owner, values)
    # sorted by owner first, where CUDA's index_add adds as its threads happen to come
    return sums.index_put((owner,), values, accumulate=True)
