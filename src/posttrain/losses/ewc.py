"""Elastic weight consolidation (Kirkpatrick et al. 2017, arXiv 1612.00796): a pull to the start, by what each weight mattered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

Gradients = Callable[[Tensor, Sequence[Tensor]], Sequence[Tensor | None]]  # of a scalar; None for a tensor that it does not touch


def plain_gradients(value: Tensor, params: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """As autograd has them."""
    return torch.autograd.grad(value, params, allow_unused=True)


def fisher_diagonal(
    log_likelihoods: Iterable[Tensor], params: Sequence[Tensor], gradients: Gradients = plain_gradients
) -> list[Tensor]:
    """Diagonal of the Fisher information at `params`: the mean over samples of the squared gradient of each one's log-likelihood.

    log_likelihoods: a scalar with gradient for each sample, made when it is asked for. Squared sample by sample: the square of a
    mean gradient would be near zero at an optimum, whatever the weights matter. float32, one tensor a parameter. gradients: how
    they are computed, where some would be lost on their way.
    """
    totals = [torch.zeros_like(p, dtype=torch.float32) for p in params]
    count = 0
    for value in log_likelihoods:
        for total, gradient in zip(totals, gradients(value, params), strict=True):
            if gradient is not None:
                total += gradient.detach().float() ** 2
        count += 1
    return [total / max(count, 1) for total in totals]


def ewc_penalty(params: Sequence[Tensor], start: Sequence[Tensor], importance: Sequence[Tensor], strength: float) -> Tensor:
    """(strength / 2) sum_i F_i (theta_i - theta0_i)^2 (eq. 3), a scalar. With all F_i = 1 it is L2 to the start."""
    parts = [(f * (p - p0) ** 2).sum() for p, p0, f in zip(params, start, importance, strict=True)]
    return 0.5 * strength * torch.stack(parts).sum()
