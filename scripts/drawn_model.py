"""A small text-to-image model from scratch on drawn pictures, in diffusers' own format, and a judge of such pictures."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from drawn import CLASSES, COLOURS, SIDE, individual, ordinary
from posttrain.losses.diffusion import denoising_loss, mixed, target
from posttrain.models.diffusion.families import diffusers, encode_pixels, encode_texts, noising
from posttrain.models.diffusion.tiny import clip_text, clip_tokenizer

PICTURES = 4000
TOKEN = "sks"
EMPTY_SHARE = 0.1  # of captions left out, for classifier-free guidance


def to_pixels(images: list[Image.Image]) -> Tensor:
    """float32 [n, 3, side, side] in -1..1"""
    return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2).float() / 127.5 - 1


def train_base(out: Path, steps: int = 5000) -> None:
    """Write the pipeline to `out`."""
    rng = random.Random(0)
    torch.manual_seed(0)
    drawn = [ordinary(rng) for _ in range(PICTURES)]
    pixels, captions = to_pixels([image for image, _, _ in drawn]), [caption for _, caption, _ in drawn]
    tokenizer = clip_tokenizer((*CLASSES, *COLOURS, TOKEN), max_length=12)
    scheduler = diffusers.DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type="v_prediction", clip_sample=False,
        set_alpha_to_one=False, rescale_betas_zero_snr=True, timestep_spacing="trailing", steps_offset=1,
    )  # fmt: skip
    pipe = diffusers.StableDiffusionPipeline(
        vae=pixel_autoencoder(), text_encoder=clip_text(64, tokenizer=tokenizer), tokenizer=tokenizer,
        unet=new_unet(), scheduler=scheduler, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    train_unet(pipe, pixels, captions, steps)
    pipe.save_pretrained(out)


@torch.no_grad()
def pixel_autoencoder() -> Any:
    """An autoencoder whose latents are the pixels: its weights are set, not trained, so that the model draws in pixels.

    Residual branches are zero. Before its last convolution each half has a group norm and a SiLU: constants beside the pixels
    keep the norm's statistics the same for every picture, and a large bias keeps the SiLU where it is a straight line.
    """
    constant, bias, channels = 30.0, 20.0, 8
    vae = diffusers.AutoencoderKL(
        block_out_channels=(channels,), latent_channels=3, norm_num_groups=1, sample_size=SIDE, mid_block_add_attention=False,
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), use_quant_conv=False,
        use_post_quant_conv=False, scaling_factor=1.4,
    )  # fmt: skip
    for name, parameter in vae.named_parameters():
        if ".conv2." in name:
            parameter.zero_()
    spread = constant * (2 / channels) ** 0.5
    for half, outputs in ((vae.encoder, 6), (vae.decoder, 3)):
        for parameter in (half.conv_in.weight, half.conv_in.bias, half.conv_out.weight, half.conv_out.bias):
            parameter.zero_()
        half.conv_in.weight[range(3), range(3), 1, 1] = 1.0
        half.conv_in.bias[3], half.conv_in.bias[4] = constant, -constant
        half.conv_norm_out.weight.fill_(1.0)
        half.conv_norm_out.bias.fill_(bias)
        half.conv_out.weight[range(3), range(3), 1, 1] = spread
        half.conv_out.weight[:3, 3:5, 1, 1] = -spread / 2  # takes away the group's mean, and the bias
        if outputs == 6:
            half.conv_out.bias[3:] = -12.0  # log of a variance that is next to nothing
    return vae.requires_grad_(False).eval()


def new_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=SIDE, in_channels=3, out_channels=3, block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8,
        attention_head_dim=4, cross_attention_dim=64, down_block_types=("DownBlock2D", "DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    )  # fmt: skip


def train_unet(pipe: Any, pixels: Tensor, captions: list[str], steps: int) -> None:
    """Every weight, with a moving average of which the pipeline keeps the end."""
    mean, std = encode_pixels(pipe.vae, pixels)
    known = sorted({*captions, ""})
    with torch.no_grad():
        texts = encode_texts(pipe, known)["prompt_embeds"]
    numbers = torch.tensor([known.index(caption) for caption in captions])
    levels, unet = noising(pipe.scheduler), pipe.unet
    average = torch.optim.swa_utils.AveragedModel(unet, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.995))
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, steps, pct_start=0.05)
    began = time.monotonic()
    for step in range(steps):
        chosen = torch.randint(len(pixels), (32,))
        said = torch.where(torch.rand(32) < EMPTY_SHARE, known.index(""), numbers[chosen])
        latents = mean[chosen] + std[chosen] * torch.randn_like(mean[chosen])
        noise, level = torch.randn_like(latents), torch.randint(len(levels.sigma), (32,))
        alpha, sigma = levels.alpha[level], levels.sigma[level]
        predicted = unet(mixed(latents, noise, alpha, sigma), levels.time[level], encoder_hidden_states=texts[said]).sample
        wanted = target(levels.kind, latents, noise, alpha, sigma)
        loss = denoising_loss(predicted, wanted, torch.ones(32), 32, 0.0).total / 32
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        average.update_parameters(unet)
        if step % 100 == 99:
            print(f"denoiser {step + 1}/{steps}  loss {loss.item():.4f}  {time.monotonic() - began:.0f} s", flush=True)
    unet.load_state_dict(average.module.state_dict())


class Judge(nn.Module):
    """Which class a picture shows, the individual being one of its own."""

    names = (*CLASSES, "individual")

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for before, after in ((3, 16), (16, 32), (32, 32)):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(32 * (SIDE // 8) ** 2, 64), nn.ReLU(), nn.Linear(64, 6))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.layers(pixels)

    @torch.no_grad()
    def shares(self, images: list[Image.Image]) -> dict[str, float]:
        """Mean probability of each name."""
        found = self(to_pixels(images)).softmax(-1).mean(0)
        return dict(zip(self.names, found.tolist(), strict=True))


def train_judge(steps: int = 400) -> tuple[Judge, float]:
    """On pictures drawn for it alone, slightly blurred and noisy as a model's are; its accuracy on new ones."""
    rng = random.Random(1)
    torch.manual_seed(1)

    def batch(count: int) -> tuple[Tensor, Tensor]:
        images, names = [], []
        for _ in range(count):
            image, _, kind = ordinary(rng)
            one = rng.random() < 1 / 6
            images.append(individual(rng) if one else image)
            names.append(Judge.names.index("individual" if one else kind))
        return to_pixels(images), torch.tensor(names)

    judge = Judge()
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    pixels, labels = batch(3000)
    for _ in range(steps):
        chosen = torch.randint(len(pixels), (64,))
        noisy = pixels[chosen] + 0.1 * torch.randn_like(pixels[chosen])
        loss = nn.functional.cross_entropy(judge(noisy), labels[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    judge.eval()
    pixels, labels = batch(600)
    with torch.no_grad():
        return judge, float((judge(pixels).argmax(-1) == labels).float().mean())
