"""Latents of views, kept once for a whole run, and the batches that steps make of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from posttrain.batch import ImageBatch, ImagePart
from posttrain.data.images.folder import Background, View, read_mask, read_view
from posttrain.runs.cache import cached_tensors

Encode = Callable[[Tensor], tuple[Tensor, Tensor]]  # pixels [n, 3, H, W] in -1..1 -> mean and std of their latents [n, c, h, w]
Levels = Callable[[int, torch.Generator], Tensor]  # count -> noise levels, int64 [count]


@dataclass(frozen=True)
class Masks:
    """What counts of a picture: its alpha, or pictures of the same stem in a folder."""

    folder: Path | None

    def of(self, view: View, alpha: Tensor) -> Tensor:
        """float32 [1, H, W]"""
        if self.folder is None:
            return alpha
        return read_mask(next(p for p in sorted(self.folder.iterdir()) if p.stem == view.path.stem), view)


@dataclass(frozen=True)
class Pictures:
    """Views with their captions' numbers, and their latents where they are cached.

    latents: (mean, std) of each, [c, h, w]; masks: [1, h, w] of each, at the latents' size; None where there are none.
    shape: of a view's latent.
    """

    views: list[View]
    captions: list[int]
    background: Background
    scale: int
    channels: int
    latents: list[tuple[Tensor, Tensor]] | None
    masks: list[Tensor] | None

    def __len__(self) -> int:
        return len(self.views)

    def shape(self, unit: int) -> tuple[int, int, int]:
        """Channels, height and width of a unit's latent."""
        view = self.views[unit]
        return self.channels, view.height // self.scale, view.width // self.scale


def load_latents(
    views: list[View], path: Path | None, background: Background, encode: Encode, each: Callable[[], None]
) -> list[tuple[Tensor, Tensor]]:
    """Mean and std of each view, from the file at `path` or through `encode`, which is then kept there."""

    def encoded() -> dict[str, Tensor]:
        found = {}
        for i, view in enumerate(views):
            mean, std = encode(read_view(view, background)[0][None])
            found |= {f"{i}.mean": mean[0].cpu(), f"{i}.std": std[0].cpu()}
            each()
        return found

    kept = cached_tensors(path, encoded) if path else encoded()
    return [(kept[f"{i}.mean"], kept[f"{i}.std"]) for i in range(len(views))]


def load_masks(views: list[View], masks: Masks, background: Background, scale: int) -> list[Tensor]:
    """[1, h, w] of each view: the share of a latent's place that counts."""
    whole = [masks.of(view, read_view(view, background)[1]) for view in views]
    return [torch.nn.functional.avg_pool2d(mask, scale) for mask in whole]


def part_of(instance: list[tuple[Pictures, int, int]], prior: list[tuple[Pictures, int, int]], levels: Levels) -> ImagePart:
    """Pictures of one shape, (set, unit, seed) each: all that is random about one is drawn from its own seed."""
    drawn = [_drawn(pictures.shape(unit), seed, levels) for pictures, unit, seed in (*instance, *prior)]
    chosen = [(pictures, unit) for pictures, unit, _ in (*instance, *prior)]
    cached = all(pictures.latents is not None for pictures, _ in chosen)
    latents = [pictures.latents[unit] for pictures, unit in chosen if pictures.latents is not None]
    pixels = [read_view(pictures.views[unit], pictures.background)[0] for pictures, unit in chosen] if not cached else []
    masked = any(pictures.masks is not None for pictures, _ in chosen)
    return ImagePart(
        mean=torch.stack([mean for mean, _ in latents]) if cached else None,
        std=torch.stack([std for _, std in latents]) if cached else None,
        pixels=torch.stack(pixels) if pixels else None,
        noise=torch.stack([each["noise"] for each in drawn]),
        draw=torch.stack([each["draw"] for each in drawn]),
        offset=torch.stack([each["offset"] for each in drawn]),
        level=torch.cat([each["level"] for each in drawn]),
        caption=torch.tensor([pictures.captions[unit] for pictures, unit in chosen]),
        sizes=torch.tensor([pictures.views[unit].sizes for pictures, unit in chosen], dtype=torch.float32),
        mask=torch.stack([_mask(pictures, unit) for pictures, unit in chosen]) if masked else None,
        num_instance=len(instance),
    )


def batch_of(instance: list[tuple[Pictures, int, int]], prior: list[tuple[Pictures, int, int]], levels: Levels) -> ImageBatch:
    """A micro-batch: both kinds of picture go through the model together, as far as their shapes agree."""
    shapes = list(dict.fromkeys(pictures.shape(unit) for pictures, unit, _ in (*instance, *prior)))
    parts = []
    for shape in shapes:
        mine, others = ([each for each in kind if each[0].shape(each[1]) == shape] for kind in (instance, prior))
        parts.append(part_of(mine, others, levels))
    return ImageBatch(tuple(parts), tuple(unit for _, unit, _ in instance), float(len(instance)))


def _drawn(shape: tuple[int, int, int], seed: int, levels: Levels) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    level = levels(1, generator)
    noise, draw = (torch.randn(shape, generator=generator) for _ in range(2))
    return {"level": level, "noise": noise, "draw": draw, "offset": torch.randn(shape[0], 1, 1, generator=generator)}


def _mask(pictures: Pictures, unit: int) -> Tensor:
    _, h, w = pictures.shape(unit)
    return pictures.masks[unit] if pictures.masks is not None else torch.ones(1, h, w)
