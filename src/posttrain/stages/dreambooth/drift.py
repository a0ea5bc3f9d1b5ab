"""What a DreamBooth run has learnt and what it has lost, as denoising losses with noise that never changes."""

from __future__ import annotations

from collections.abc import Callable

import torch

from posttrain.batch import ImageBatch, ImagePart
from posttrain.data.images.latents import Pictures, batch_of
from posttrain.losses.diffusion import denoising_loss, mixed, target
from posttrain.models.diffusion.families import DiffusionModel, Noising
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset

DRIFT = ("class", "unrelated")  # sets of pictures whose loss says what was lost
BATCH = 8  # pictures in a forward pass without gradients


class DriftEvaluator:
    """Pictures of the individual, and those that the model itself made of its class and of other things before it was trained.

    The loss on the latter is as low as it gets with the model as it was: its rise is language drift, a stand-in for KL(p0 | p)
    that needs no samples of the trained model.
    """

    def __init__(self, cfg: Dreambooth, dataset: DreamboothDataset, noising: Noising) -> None:
        self.batches: dict[str, list[ImageBatch]] = {}
        levels, seed = cfg.eval.levels, cfg.train.seed
        for name, pictures in {"eval": dataset.instance, **dataset.probes}.items():
            if cfg.eval.images:
                self.batches[name] = _batches(pictures, levels, seed, len(noising.sigma))

    def measure(self, model: DiffusionModel, check: Callable[[], None]) -> dict[str, float]:
        """<name>/loss: the mean over pictures and noise levels."""
        found = {}
        for name, batches in self.batches.items():
            total, count = 0.0, 0.0
            for batch in batches:
                for part in batch.to(next(model.parameters()).device).parts:
                    total += float(_loss(model, part))
                    count += part.num_instance
                check()
            found[f"{name}/loss"] = total / count
        return found


def _batches(pictures: Pictures, levels: int, seed: int, num_levels: int) -> list[ImageBatch]:
    """Each picture at `levels` levels, evenly spread over the schedule, with noise of its own."""
    by_shape: dict[tuple[int, int, int], list[int]] = {}
    for unit in range(len(pictures)):
        by_shape.setdefault(pictures.shape(unit), []).append(unit)
    batches = []
    for units in by_shape.values():
        pairs = [(unit, k) for unit in units for k in range(levels)]
        for start in range(0, len(pairs), BATCH):
            chosen = pairs[start : start + BATCH]
            spread = iter([int((k + 0.5) * num_levels / levels) for _, k in chosen])
            rows = [(pictures, unit, seed + unit * levels + k) for unit, k in chosen]
            batches.append(batch_of(rows, [], lambda count, generator, spread=spread: torch.tensor([next(spread)])))
    return batches


@torch.no_grad()
def _loss(model: DiffusionModel, part: ImagePart) -> torch.Tensor:
    latents = model.latents(part)
    alpha, sigma = (table.to(latents.device)[part.level] for table in (model.noising.alpha, model.noising.sigma))
    wanted = target(model.noising.kind, latents, part.noise, alpha, sigma)
    predicted = model(part, mixed(latents, part.noise, alpha, sigma))
    return denoising_loss(predicted, wanted, torch.ones_like(alpha), part.num_instance, 0.0).total
