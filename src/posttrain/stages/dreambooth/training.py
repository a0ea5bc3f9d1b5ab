"""3. What a step of DreamBooth draws, its loss, and what is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from posttrain.batch import ImageBatch, ImagePart, LossOutput
from posttrain.data.images.latents import batch_of
from posttrain.evaluation.forgetting import forgetting_percent
from posttrain.losses.diffusion import added, denoising_loss, min_snr_weight, mixed, offset_noise, target
from posttrain.models.diffusion.families import DiffusionModel, draw_levels
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset
from posttrain.stages.dreambooth.drift import DRIFT, DriftEvaluator
from posttrain.stages.dreambooth.sample_logger import SampleLogger
from posttrain.stages.steps import Context, Measured, Session
from posttrain.training.objective import Update

PRIOR, PLACES = 1, 8191  # which kind of picture, and how many of them a step may have


@dataclass(frozen=True)
class DreamboothTraining:
    """What a step draws, computes and measures."""

    context: Context
    dataset: DreamboothDataset
    model: DiffusionModel
    session: Session
    drift: DriftEvaluator
    samples: SampleLogger

    @property
    def cfg(self) -> Dreambooth:
        """The run's config."""
        return self.context.cfg

    def updates(self, step: int) -> Iterator[Update[ImageBatch]]:
        """Every picture's randomness is a function of the run's seed, the step, and its place in the step."""
        dataset, order = self.dataset, self.dataset.inputs.order
        rank = self.session.accelerator.process_index
        batches = []
        priors = dataset.prior_order.micro(step, rank) if dataset.prior_order else [[] for _ in range(order.grad_accum)]
        for number, (units, others) in enumerate(zip(order.micro(step, rank), priors, strict=False)):
            first = (number * order.world_size + rank) * order.batch_size
            drawn = units or [0]  # a process that has run out goes along with the others, and counts for nothing
            mine = [(dataset.instance, unit, self._seed(step, first + i, 0)) for i, unit in enumerate(drawn)]
            theirs = [(dataset.prior, unit, self._seed(step, first + i, PRIOR)) for i, unit in enumerate(others)]
            batch = batch_of(mine, theirs, self._levels)
            batches.append(batch if units else replace(batch, loss_denominator=0.0))
        yield Update(batches)

    def _levels(self, count: int, generator: torch.Generator) -> Tensor:
        """int64 [count]: how much noise."""
        how = self.cfg.dreambooth.levels
        how = self.model.family.levels if how == "auto" else how
        return draw_levels(how, count, generator, len(self.model.noising.sigma))

    def _seed(self, step: int, place: int, kind: int) -> int:
        return (((self.cfg.train.seed * 1_000_003 + step) * PLACES + place) * 2 + kind) % 2**63

    def loss(self, module: nn.Module, batch: ImageBatch) -> LossOutput:
        """The denoising loss of a batch, of all its parts."""
        return added([self._loss(module, part) for part in batch.parts])

    def _loss(self, module: nn.Module, part: ImagePart) -> LossOutput:
        options, noising = self.cfg.dreambooth, self.model.noising
        latents = self.model.latents(part)
        alpha, sigma = (table.to(latents.device)[part.level] for table in (noising.alpha, noising.sigma))
        part = replace(part, noise=offset_noise(part.noise, part.offset, options.noise_offset))
        wanted = target(noising.kind, latents, part.noise, alpha, sigma)
        weight = min_snr_weight(noising.kind, alpha, sigma, options.min_snr) if options.min_snr else torch.ones_like(alpha)
        predicted = module(part, mixed(latents, part.noise, alpha, sigma))
        return denoising_loss(predicted, wanted, weight, part.num_instance, self.cfg.prior.weight, part.mask)

    def measure(self, done: int, check: Callable[[], None]) -> Measured:
        """Losses with noise that never changes, and samples."""
        self.session.module.eval()
        found = self.drift.measure(self.model, check)
        if self.context.main:
            found |= self.samples.log(self.model, done, check)
        return Measured(found)


def drift_percent(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """By how much the loss on pictures of the class, and on others, has risen."""
    measured = [name for name in DRIFT if f"{name}/loss" in after]
    return {f"drift_{n}/percent": forgetting_percent(before[f"{n}/loss"], after[f"{n}/loss"]) for n in measured}
