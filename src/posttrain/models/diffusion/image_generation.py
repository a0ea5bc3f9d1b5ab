"""Pictures from a pipeline, each by a seed of its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.models.diffusion.families import FAMILIES, Texts, decode_latents, from_squares, latent_scale


class Drawing(NamedTuple):
    """How pictures are drawn. width, height: pixels. guidance: None for the family's usual one."""

    width: int
    height: int
    steps: int
    guidance: float | None
    batch_size: int


def draw(
    pipe: Any, texts: Texts, negative: Texts, seeds: list[int], how: Drawing, each: Callable[[], None] = lambda: None
) -> list[Any]:
    """A PIL image for each row of `texts`, by the seed at its place. negative: one row. each: called after every batch.

    What a picture looks like depends on its seed, its text and the model alone.
    """

    def drawn(rows: list[int]) -> list[Any]:
        chosen = {name: value[torch.tensor(rows, device=value.device)] for name, value in texts.items()}
        latents = _latents(pipe, chosen, negative, [seeds[row] for row in rows], how)
        return pipe.image_processor.postprocess(decode_latents(pipe.vae, latents), output_type="pil")

    found = []
    for start in range(0, len(seeds), how.batch_size):
        rows = list(range(start, min(start + how.batch_size, len(seeds))))
        found += [image for some in in_parts(drawn, rows, in_two, "drawing pictures") for image in some]
        each()
    return found


@torch.no_grad()
def _latents(pipe: Any, texts: Texts, negative: Texts, seeds: list[int], how: Drawing) -> Tensor:
    family = FAMILIES[type(pipe).__name__]
    guidance = family.guidance if how.guidance is None else how.guidance
    denoiser = getattr(pipe, family.denoiser)
    given: dict[str, Any] = {name: value.to(denoiser.device, denoiser.dtype) for name, value in texts.items()}
    if guidance > 1 and not family.distilled:
        rows = len(seeds)
        given |= {
            f"negative_{name}": value.to(denoiser.device, denoiser.dtype).expand(rows, *value.shape[1:])
            for name, value in negative.items()
        }
    latents = pipe(
        **given, guidance_scale=guidance, num_inference_steps=how.steps, width=how.width, height=how.height,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], output_type="latent",
    ).images  # fmt: skip
    scale = latent_scale(pipe)
    return from_squares(latents, how.height // scale, how.width // scale) if family.distilled else latents
