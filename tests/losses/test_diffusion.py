"""Targets and weights by hand, and against diffusers' own schedulers."""

from typing import Any

import diffusers as library
import pytest
import torch

from posttrain.losses.diffusion import Prediction, added, denoising_loss, min_snr_weight, mixed, offset_noise, target
from posttrain.models.diffusion.families import noising

diffusers: Any = library
Z, E = torch.tensor([[[[1.0, -2.0]]]]), torch.tensor([[[[0.5, 3.0]]]])


def one(value: float) -> torch.Tensor:
    return torch.tensor([value])


@pytest.mark.parametrize(
    ("kind", "alpha", "sigma", "noisy", "wanted"),
    [
        ("epsilon", 0.8, 0.6, [1.1, 0.2], [0.5, 3.0]),
        ("v_prediction", 0.8, 0.6, [1.1, 0.2], [0.8 * 0.5 - 0.6, 0.8 * 3 + 0.6 * 2]),
        ("sample", 0.8, 0.6, [1.1, 0.2], [1.0, -2.0]),
        ("flow", 0.75, 0.25, [0.875, -0.75], [-0.5, 5.0]),
    ],
)
def test_what_is_mixed_and_what_is_wanted_by_hand(
    kind: Prediction, alpha: float, sigma: float, noisy: list[float], wanted: list[float]
) -> None:
    assert mixed(Z, E, one(alpha), one(sigma)).flatten().tolist() == pytest.approx(noisy)
    assert target(kind, Z, E, one(alpha), one(sigma)).flatten().tolist() == pytest.approx(wanted)


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("zero_snr", [False, True])
def test_noise_and_target_are_those_of_ddpm(prediction: str, zero_snr: bool) -> None:
    torch.manual_seed(0)
    scheduler = diffusers.DDPMScheduler(
        beta_schedule="scaled_linear", prediction_type=prediction, rescale_betas_zero_snr=zero_snr
    )
    latents, noise, level = torch.randn(6, 4, 3, 3), torch.randn(6, 4, 3, 3), torch.tensor([0, 1, 200, 500, 998, 999])
    found = noising(diffusers.PNDMScheduler.from_config(scheduler.config) if not zero_snr else scheduler)
    alpha, sigma = found.alpha[level], found.sigma[level]
    assert torch.allclose(mixed(latents, noise, alpha, sigma), scheduler.add_noise(latents, noise, level), atol=1e-6)
    expected = noise if prediction == "epsilon" else scheduler.get_velocity(latents, noise, level)
    assert found.kind == prediction
    assert torch.allclose(target(found.kind, latents, noise, alpha, sigma), expected, atol=1e-6)
    assert torch.equal(found.time[level], level)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_noise_and_velocity_are_those_of_flow_matching(shift: float) -> None:
    torch.manual_seed(0)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    latents, noise, level = torch.randn(3, 4, 2, 2), torch.randn(3, 4, 2, 2), torch.tensor([0, 400, 999])
    found = noising(scheduler)
    expected = scheduler.scale_noise(latents, scheduler.timesteps[level], noise)
    assert torch.allclose(mixed(latents, noise, found.alpha[level], found.sigma[level]), expected, atol=1e-6)
    assert torch.allclose(found.time[level], scheduler.timesteps[level])
    # one Euler step with the true velocity, from the noisiest level to none, gives the picture back
    noisy, velocity = mixed(latents, noise, found.alpha[[0]], found.sigma[[0]]), target("flow", latents, noise, one(0), one(1))
    assert torch.allclose(noisy - found.sigma[0] * velocity, latents, atol=1e-5)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample", "flow"])
def test_min_snr_caps_the_weight_of_an_error_of_the_picture(kind: Prediction) -> None:
    # an error d of the picture, put in terms of the prediction, must weigh min(SNR, gamma) d^2
    gamma, alpha, sigma = 5.0, torch.tensor([0.99, 0.6, 0.1]), None
    sigma = 1 - alpha if kind == "flow" else (1 - alpha**2).sqrt()
    d = 0.3
    in_prediction = {"epsilon": alpha / sigma * d, "v_prediction": d / sigma, "sample": d + 0 * alpha, "flow": d / sigma}[kind]
    weighed = min_snr_weight(kind, alpha, sigma, gamma) * in_prediction**2
    assert torch.allclose(weighed, ((alpha / sigma) ** 2).clamp_max(gamma) * d**2, rtol=1e-5)


def test_epsilon_at_snr_of_36_by_hand_and_pure_noise() -> None:
    alpha, sigma = torch.tensor([6 / 37**0.5, 0.0]), torch.tensor([1 / 37**0.5, 1.0])
    assert min_snr_weight("epsilon", alpha, sigma, 5.0).tolist() == pytest.approx([5 / 36, 1.0], rel=1e-4)


def test_the_loss_is_instance_plus_lambda_prior() -> None:
    prediction, wanted = torch.zeros(3, 1, 1, 2), torch.tensor([[1.0, 3.0], [2.0, 0.0], [4.0, 4.0]]).reshape(3, 1, 1, 2)
    output = denoising_loss(prediction, wanted, torch.tensor([1.0, 0.5, 1.0]), 1, 0.25)
    assert float(output.total) == pytest.approx(5 + 0.25 * (0.5 * 2 + 16))
    assert [float(output.metrics[n][0]) for n in ("loss_instance", "loss_prior")] == [5.0, 18.0]
    assert output.metrics["loss"][1] == 1.0 and output.metrics["loss_prior"][1] == 2.0


def test_lambda_0_is_no_prior() -> None:
    torch.manual_seed(0)
    prediction, wanted = torch.randn(4, 2, 3, 3, requires_grad=True), torch.randn(4, 2, 3, 3)
    weight = torch.ones(4)
    both = denoising_loss(prediction, wanted, weight, 2, 0.0).total
    alone = denoising_loss(prediction[:2], wanted[:2], weight[:2], 2, 0.0).total
    assert float(both.detach()) == pytest.approx(float(alone.detach()))
    (gradient,) = torch.autograd.grad(both, [prediction])
    assert not gradient[2:].any() and gradient[:2].any()


def test_a_mask_counts_what_it_lets_through() -> None:
    wanted = torch.tensor([[[[1.0, 9.0], [3.0, 9.0]]]])
    mask = torch.tensor([[[[1.0, 0.0], [1.0, 0.0]]]])
    output = denoising_loss(torch.zeros_like(wanted), wanted, torch.ones(1), 1, 0.0, mask)
    assert float(output.total) == pytest.approx((1 + 9) / 2)
    whole = denoising_loss(torch.zeros_like(wanted), wanted, torch.ones(1), 1, 0.0, torch.ones_like(mask))
    assert float(whole.total) == pytest.approx((1 + 81 + 9 + 81) / 4)


def test_parts_add_up_and_offset_moves_whole_channels() -> None:
    parts = [denoising_loss(torch.zeros(n, 1, 1, 1), torch.ones(n, 1, 1, 1), torch.ones(n), 1, 2.0) for n in (1, 3)]
    whole = added(parts)
    assert float(whole.total) == pytest.approx(2 + 2 * 2)
    assert float(whole.metrics["loss"][0]) == pytest.approx(6) and whole.metrics["loss_prior"][1] == 2
    moved = offset_noise(torch.zeros(1, 2, 2, 2), torch.tensor([[[[1.0]], [[-2.0]]]]), 0.1)
    assert moved[0, 0].unique().tolist() == pytest.approx([0.1]) and moved[0, 1].unique().tolist() == pytest.approx([-0.2])
