"""Steps with cached latents and text embeddings beside steps that encode every picture and prompt, on the same pictures; the
fastest step of each.

python benchmarks/dreambooth_speed.py                          (a random Stable Diffusion 1.5 of half its width, LoRA, 256 pixels)
python benchmarks/dreambooth_speed.py --side 512 --width 1      (as the real one is: 12 GB of memory)
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

import torch
from PIL import Image

import posttrain
from posttrain.models.diffusion.families import diffusers
from posttrain.models.diffusion.tiny import clip_text, clip_tokenizer

STEPS = 4


def make_pipeline(out: Path, side: int, width: float) -> None:
    """Stable Diffusion 1.5's own layers, `width` times as wide: encoder and denoiser keep their proportions."""
    torch.manual_seed(0)

    def wide(*channels: int) -> tuple[int, ...]:
        return tuple(round(width * each) for each in channels)

    unet = diffusers.UNet2DConditionModel(
        sample_size=side // 8,
        block_out_channels=wide(320, 640, 1280, 1280),
        cross_attention_dim=round(width * 768),
        attention_head_dim=8,
        norm_num_groups=32,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=wide(128, 256, 512, 512), layers_per_block=2, latent_channels=4, norm_num_groups=32, sample_size=side,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
    )  # fmt: skip
    diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=clip_text(round(width * 768), layers=12), tokenizer=clip_tokenizer(), unet=unet,
        scheduler=diffusers.DDIMScheduler(beta_schedule="scaled_linear"), safety_checker=None, feature_extractor=None,
        requires_safety_checker=False,
    ).save_pretrained(out)  # fmt: skip


def seconds_a_step(base: Path, photos: Path, run: Path, cache: bool) -> list[float]:
    words = [
        "+peft=lora",
        "peft.targets=attention",
        f"model.name={base}",
        "model.dtype=float32",
        f"data.instance_dir={photos}",
        "data.instance_prompt=a sks car",
        f"data.cache={str(cache).lower()}",
        "prior.weight=0",
        "sample.images=0",
        "eval.images=0",
        f"train.max_steps={STEPS}",
        f"run.dir={run}",
    ]
    posttrain.run("dreambooth", *words)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [1 / line["train/images_per_second"] for line in lines if line["step"] > 1 and "train/images_per_second" in line]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--width", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=2)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        make_pipeline(place / "base", args.side, args.width)
        (place / "photos").mkdir()
        for i in range(3):
            Image.effect_noise((args.side, args.side), 40 + i).convert("RGB").save(place / "photos" / f"{i}.png")
        found: dict[bool, list[float]] = {True: [], False: []}
        for number in range(args.rounds):
            for cache in (False, True):
                found[cache] += seconds_a_step(place / "base", place / "photos", place / f"{number}-{cache}", cache)
    every, cached = (min(found[cache]) for cache in (False, True))
    print(f"encoding every step {every:.2f} s, cached {cached:.2f} s a step: {every / cached:.2f} times as fast")


if __name__ == "__main__":
    main()
