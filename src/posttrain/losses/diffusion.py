"""Denoising losses: what a picture is mixed with noise to, what the model is to say about it, and how that is weighed.

z is a latent, e noise of its shape, x_t = alpha z + sigma e. Variance preserving families have alpha^2 + sigma^2 = 1 and
predict e (Ho et al. 2020, arXiv 2006.11239) or v (Salimans & Ho 2022, arXiv 2202.00512); flow matching has alpha + sigma = 1
and predicts the velocity e - z (Esser et al. 2024, arXiv 2403.03206).
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from posttrain.batch import LossOutput, Metrics

Prediction = Literal["epsilon", "v_prediction", "sample", "flow"]


def mixed(latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """x_t. latents, noise: [n, ...]; alpha, sigma: [n]."""
    return _like(alpha, latents) * latents + _like(sigma, latents) * noise


def target(kind: Prediction, latents: Tensor, noise: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    """What a model that predicts `kind` is to say."""
    if kind == "epsilon":
        return noise
    if kind == "v_prediction":
        return _like(alpha, latents) * noise - _like(sigma, latents) * latents
    return latents if kind == "sample" else noise - latents


def min_snr_weight(kind: Prediction, alpha: Tensor, sigma: Tensor, gamma: float) -> Tensor:
    """min(SNR, gamma) as the weight of the loss on z (Hang et al. 2023, arXiv 2303.09556), in terms of what is predicted: [n].

    SNR = alpha^2 / sigma^2. An error of e is SNR^-1 of the one of z, of v (SNR + 1)^-1, of a velocity (alpha = 1 - sigma)
    sigma^2.
    """
    snr = (alpha / sigma.clamp_min(1e-12)) ** 2
    capped = snr.clamp_max(gamma)
    if kind == "epsilon":
        return torch.where(snr > 0, capped / snr.clamp_min(1e-12), 1.0)
    if kind == "v_prediction":
        return capped / (snr + 1)
    return capped if kind == "sample" else capped * sigma**2


def offset_noise(noise: Tensor, offset: Tensor, strength: float) -> Tensor:
    """Noise that also moves a channel as a whole, so that very dark and very bright pictures can be learnt. offset: [n, c, 1,
    1]."""
    return noise + strength * offset


def denoising_loss(
    prediction: Tensor, wanted: Tensor, weight: Tensor, num_instance: int, prior_weight: float, mask: Tensor | None = None
) -> LossOutput:
    """Sum over pictures of the mean squared error, the prior's times lambda (Ruiz et al. 2022, arXiv 2208.12242, eq. 2).

    prediction, wanted: [n, c, h, w], the first num_instance of the individual, the rest of the prior. weight: [n], of each
    picture's noise level. mask: [n, 1, h, w] in 0..1, how much each place counts; the mean is over what counts. Divided by the
    number of instance pictures, with as many of the prior beside them, the total is L_instance + lambda L_prior.
    """
    error = (prediction.float() - wanted.float()) ** 2
    if mask is not None:
        error = error * mask / _like(mask.mean((1, 2, 3)).clamp_min(1e-6), error)
    each = error.mean((1, 2, 3))
    instance, prior = (each * weight).tensor_split([num_instance])
    total = instance.sum() + prior_weight * prior.sum()
    metrics: Metrics = {"loss": (total.detach(), float(len(instance)))}
    for name, losses in (("loss_instance", each[:num_instance]), ("loss_prior", each[num_instance:])):
        if len(losses):
            metrics[name] = (losses.sum().detach(), float(len(losses)))
    return LossOutput(total, metrics, {"loss": each.detach()})


def added(outputs: list[LossOutput]) -> LossOutput:
    """Of several parts of one batch, the sum."""
    metrics: Metrics = {}
    for output in outputs:
        for name, (total, count) in output.metrics.items():
            before = metrics.get(name)
            metrics[name] = (before[0] + total, before[1] + count) if before else (total, count)
    return LossOutput(torch.stack([output.total for output in outputs]).sum(), metrics)


def _like(values: Tensor, latents: Tensor) -> Tensor:
    """[n] -> [n, 1, ...]"""
    return values.to(latents.device).reshape(-1, *(1 for _ in latents.shape[1:]))
