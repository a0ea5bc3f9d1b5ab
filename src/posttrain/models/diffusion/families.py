"""Diffusion pipelines of diffusers in one code path; one table says what the families differ in.

A pipeline is a denoiser (UNet or transformer), text encoders, an autoencoder and a schedule. Everything here speaks of latents
as the denoiser sees them: shifted and scaled.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.batch import ImagePart

diffusers: Any = importlib.import_module("diffusers")  # its annotations are not always right
Texts = dict[str, Tensor]  # "prompt_embeds" [n, tokens, width] and, where a family has it, "pooled_prompt_embeds" [n, width]
FLUX_GUIDANCE = 3.5  # a distilled model is told the guidance that it is to imitate
LATENT_BATCH = 8  # pictures that go through the autoencoder at a time


def quiet() -> None:
    """No progress bars, and no warnings about image processors, which are not used here."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging

    for each in (diffusers_logging, logging):
        each.disable_progress_bar()
        each.set_verbosity_error()


@dataclass(frozen=True)
class Family:
    """denoiser: the component's name. text: names of what encode_prompt returns. predict: calls the denoiser. levels: how
    noise levels are drawn in training, as the family's authors did. guidance: of classifier-free guidance in sampling."""

    denoiser: Literal["unet", "transformer"]
    text: tuple[str | None, ...]
    predict: Callable[[Any, Tensor, Tensor, Texts, Tensor], Tensor]
    levels: Literal["uniform", "logit_normal"]
    guidance: float
    distilled: bool = False  # guidance is an input of the model, which sees its latents as rows of 2 x 2 squares


def _predict_unet(unet: Any, noisy: Tensor, time: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
    return unet(noisy, time, encoder_hidden_states=texts["prompt_embeds"]).sample


def _predict_unet_xl(unet: Any, noisy: Tensor, time: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
    added = {"text_embeds": texts["pooled_prompt_embeds"], "time_ids": sizes.to(noisy.dtype)}
    return unet(noisy, time, encoder_hidden_states=texts["prompt_embeds"], added_cond_kwargs=added).sample


def _predict_sd3(transformer: Any, noisy: Tensor, time: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
    return transformer(
        hidden_states=noisy, timestep=time, encoder_hidden_states=texts["prompt_embeds"],
        pooled_projections=texts["pooled_prompt_embeds"],
    ).sample  # fmt: skip


def _predict_flux(transformer: Any, noisy: Tensor, time: Tensor, texts: Texts, sizes: Tensor) -> Tensor:
    n, _, h, w = noisy.shape
    rows, columns = torch.meshgrid(torch.arange(h // 2), torch.arange(w // 2), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3).to(noisy)
    guidance = torch.full((n,), FLUX_GUIDANCE).to(noisy) if bare(transformer).config.guidance_embeds else None
    found = transformer(
        hidden_states=_to_squares(noisy), timestep=time / 1000, guidance=guidance, encoder_hidden_states=texts["prompt_embeds"],
        pooled_projections=texts["pooled_prompt_embeds"], img_ids=places,
        txt_ids=torch.zeros(texts["prompt_embeds"].shape[1], 3).to(noisy),
    ).sample  # fmt: skip
    return from_squares(found, h, w)


def _to_squares(latents: Tensor) -> Tensor:
    """[n, c, h, w] -> [n, h/2 * w/2, 4c]"""
    n, c, h, w = latents.shape
    return latents.reshape(n, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(n, h // 2 * (w // 2), 4 * c)


def from_squares(squares: Tensor, h: int, w: int) -> Tensor:
    """[n, h/2 * w/2, 4c] -> [n, c, h, w]"""
    n, _, wide = squares.shape
    return squares.reshape(n, h // 2, w // 2, wide // 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(n, wide // 4, h, w)


_PROMPT, _POOLED = "prompt_embeds", "pooled_prompt_embeds"
FAMILIES = {
    "StableDiffusionPipeline": Family("unet", (_PROMPT, None), _predict_unet, "uniform", 7.5),
    "StableDiffusionXLPipeline": Family("unet", (_PROMPT, None, _POOLED, None), _predict_unet_xl, "uniform", 5.0),
    "StableDiffusion3Pipeline": Family("transformer", (_PROMPT, None, _POOLED, None), _predict_sd3, "logit_normal", 7.0),
    "FluxPipeline": Family("transformer", (_PROMPT, _POOLED, None), _predict_flux, "uniform", FLUX_GUIDANCE, distilled=True),
}  # by the class that a pipeline's model_index.json names


class Noising(NamedTuple):
    """The noise levels of a schedule: x = alpha z + sigma e at time, each [levels]; and what the denoiser predicts."""

    kind: Literal["epsilon", "v_prediction", "sample", "flow"]
    alpha: Tensor
    sigma: Tensor
    time: Tensor


def noising(scheduler: Any) -> Noising:
    """The training schedule that a pipeline's sampler belongs to."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        flow = diffusers.FlowMatchEulerDiscreteScheduler.from_config(scheduler.config)
        sigma = flow.sigmas[: flow.config.num_train_timesteps].float()
        return Noising("flow", 1 - sigma, sigma, flow.timesteps.float())
    training = diffusers.DDPMScheduler.from_config(scheduler.config)
    kept = training.alphas_cumprod.float()
    return Noising(training.config.prediction_type, kept.sqrt(), (1 - kept).sqrt(), torch.arange(len(kept)))


def draw_levels(how: str, count: int, generator: torch.Generator, num_levels: int) -> Tensor:
    """int64 [count]. logit_normal: the middle of the schedule more often (Esser et al. 2024, section 3.1)."""
    if how == "uniform":
        return torch.randint(num_levels, (count,), generator=generator)
    share = torch.sigmoid(torch.randn(count, generator=generator))
    return (share * num_levels).long().clamp_max(num_levels - 1)


def encode_texts(pipe: Any, prompts: Sequence[str]) -> Texts:
    """The embeddings of each prompt, by the pipeline's own encoders."""
    family = FAMILIES[type(pipe).__name__]
    known = inspect.signature(pipe.encode_prompt).parameters
    asked: dict[str, Any] = {"prompt": list(prompts), "prompt_2": None, "prompt_3": None, "num_images_per_prompt": 1}
    asked |= {"device": text_device(pipe), "do_classifier_free_guidance": False}
    found = pipe.encode_prompt(**{name: value for name, value in asked.items() if name in known})
    return {name: value for name, value in zip(family.text, found, strict=True) if name}


def negative_texts(pipe: Any) -> Texts:
    """The embeddings of the empty prompt, for classifier-free guidance."""
    texts = encode_texts(pipe, [""])
    zero = bool(pipe.config.get("force_zeros_for_empty_prompt", False))
    return {name: torch.zeros_like(value) if zero else value for name, value in texts.items()}


def text_device(pipe: Any) -> torch.device:
    return pipe.text_encoder.device


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """By component name, as far as the pipeline has them loaded."""
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    return {name: module for name in names if (module := getattr(pipe, name)) is not None}


@torch.no_grad()
def encode_pixels(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """float32 [n, 3, H, W] in -1..1 -> mean and std of the posterior, float32 [n, c, h, w]."""
    pieces = [vae.encode(piece.to(vae.device, vae.dtype)).latent_dist for piece in pixels.split(LATENT_BATCH)]
    mean, std = torch.cat([p.mean for p in pieces]).float(), torch.cat([p.std for p in pieces]).float()
    center, spread = _normal(vae, mean)
    return (mean - center) / spread, std / spread


@torch.no_grad()
def decode_latents(vae: Any, latents: Tensor) -> Tensor:
    """The inverse: float32 [n, c, h, w] -> [n, 3, H, W]."""
    center, spread = _normal(vae, latents.float())
    pieces = (latents.float() * spread + center).split(LATENT_BATCH)
    return torch.cat([vae.decode(piece.to(vae.device, vae.dtype), return_dict=False)[0] for piece in pieces]).float()


def _normal(vae: Any, latents: Tensor) -> tuple[Tensor | float, Tensor | float]:
    """What is taken from an autoencoder's latents, and what they are then divided by."""
    config = vae.config
    if getattr(config, "latents_mean", None):
        center, spread = (torch.tensor(x).to(latents).reshape(1, -1, 1, 1) for x in (config.latents_mean, config.latents_std))
        return center, spread / config.scaling_factor
    return getattr(config, "shift_factor", None) or 0.0, 1 / config.scaling_factor


def latent_scale(pipe: Any) -> int:
    """Pixels a side of what one latent stands for."""
    return 2 ** (len(pipe.vae.config.block_out_channels) - 1)


class DiffusionModel(nn.Module):
    """What is trained of a pipeline. The denoiser, and text encoders if they are trained, are its submodules; all else is the
    pipeline's.

    captions: the texts that the indices in a part's `caption` stand for; texts: their embeddings, None where encoders are trained
    or nothing is cached.
    """

    def __init__(self, pipe: Any, captions: list[str], texts: Texts | None, trained: dict[str, nn.Module]) -> None:
        super().__init__()
        self.pipe, self.captions, self.texts = pipe, captions, texts
        self.family = FAMILIES[type(pipe).__name__]
        self.noising = noising(pipe.scheduler)
        self.trained = nn.ModuleDict(trained)
        self.trains_text = any(name.startswith("text_encoder") for name in trained)

    @property
    def denoiser(self) -> nn.Module:
        """The denoiser, with the PEFT method on it."""
        return self.trained[self.family.denoiser]

    def forward(self, part: ImagePart, noisy: Tensor) -> Tensor:
        """The prediction about x_t, float32 [n, c, h, w]."""
        denoiser = bare(self.denoiser)
        texts = {name: value.to(denoiser.dtype) for name, value in self.conditions(part.caption).items()}
        time = self.noising.time.to(noisy.device)[part.level]
        return self.family.predict(self.denoiser, noisy.to(denoiser.dtype), time, texts, part.sizes).float()

    def latents(self, part: ImagePart) -> Tensor:
        """One draw from the posterior of each picture's latent, by the part's own random numbers."""
        mean, std = (part.mean, part.std) if part.pixels is None else encode_pixels(self.pipe.vae, part.pixels)
        assert mean is not None and std is not None
        return mean + std * part.draw

    def conditions(self, caption: Tensor) -> Texts:
        if self.texts is not None:
            return {name: value.to(caption.device)[caption] for name, value in self.texts.items()}
        with torch.set_grad_enabled(self.trains_text and torch.is_grad_enabled()):
            return encode_texts(self.pipe, [self.captions[i] for i in caption.tolist()])


def bare(module: Any) -> Any:
    """The model inside peft's wrapper."""
    return module.get_base_model() if hasattr(module, "get_base_model") else module
