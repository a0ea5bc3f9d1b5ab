"""DreamBooth: a text-to-image model learns one individual, and keeps its class (Ruiz et al. 2022, arXiv 2208.12242)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from posttrain.batch import ImageBatch, ImagePart, LossOutput
from posttrain.config.schema import Dreambooth
from posttrain.console import say
from posttrain.data.images.latents import batch_of
from posttrain.losses.diffusion import added, denoising_loss, min_snr_weight, mixed, offset_noise, target
from posttrain.models.diffusion.families import draw_levels
from posttrain.runs.directory import Run
from posttrain.stages.dreambooth.dataset import DreamboothDataset, ImageInputs, announce, read_images
from posttrain.stages.dreambooth.drift import DriftEvaluator
from posttrain.stages.dreambooth.model import DreamboothModel, build_dreambooth, save_dreambooth
from posttrain.stages.dreambooth.sample_logger import SampleLogger
from posttrain.stages.stage import StageRun, run_stage
from posttrain.training.objective import Update

PRIOR, PLACES = 1, 8191  # which kind of picture, and how many of them a step may have


def run(cfg: Dreambooth, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    return run_stage(cfg, run, lambda accelerator, stop: DreamboothRun(cfg, run, accelerator, stop))


class DreamboothRun(StageRun[ImageInputs, ImageBatch]):
    cfg: Dreambooth  # pyright: ignore[reportIncompatibleVariableOverride]
    unit = "images"

    def read(self) -> ImageInputs:
        return read_images(self.cfg, self.accelerator.num_processes)

    def identity(self, inputs: ImageInputs) -> dict[str, Any]:
        parents = [parent.digest for parent in inputs.parents]
        return super().identity(inputs) | {"model.weights": inputs.base.digest, "init.parents": parents}

    def announce(self, inputs: ImageInputs) -> None:
        announce(self.cfg, self.run, inputs)

    def build(self, inputs: ImageInputs) -> tuple[nn.Module, DreamboothModel]:
        gallery = DreamboothDataset(self.cfg, inputs, self.accelerator.device, self.stop)
        with self.accelerator.main_process_first():  # the others find what it makes in the cache
            gallery.fill()
        self.gallery = gallery
        built = build_dreambooth(self.cfg, gallery, inputs.order.num_steps)
        self.model = built.module
        how = self.cfg.dreambooth.levels
        how = self.model.family.levels if how == "auto" else how
        self.levels = lambda count, generator: draw_levels(how, count, generator, len(self.model.noising.sigma))
        self.probes = DriftEvaluator(self.cfg, gallery, self.model.noising)
        self.painter = SampleLogger(self.cfg, self.run.dir, gallery)
        return built.module, built

    def updates(self, step: int, module: nn.Module, inputs: ImageInputs, table: Any) -> Iterator[Update[ImageBatch]]:
        """Every picture's randomness is a function of the run's seed, the step, and its place in the step."""
        order, gallery = inputs.order, self.gallery
        rank = self.accelerator.process_index
        batches = []
        priors = gallery.prior_order.micro(step, rank) if gallery.prior_order else [[] for _ in range(order.grad_accum)]
        for number, (units, others) in enumerate(zip(order.micro(step, rank), priors, strict=False)):
            first = (number * order.world_size + rank) * order.batch_size
            drawn = units or [0]  # a process that has run out goes along with the others, and counts for nothing
            mine = [(gallery.instance, unit, self._seed(step, first + i, 0)) for i, unit in enumerate(drawn)]
            theirs = [(gallery.prior, unit, self._seed(step, first + i, PRIOR)) for i, unit in enumerate(others)]
            batch = batch_of(mine, theirs, self.levels)
            batches.append(batch if units else replace(batch, loss_denominator=0.0))
        yield Update(batches)

    def _seed(self, step: int, place: int, kind: int) -> int:
        return (((self.cfg.train.seed * 1_000_003 + step) * PLACES + place) * 2 + kind) % 2**63

    def objective(self, module: nn.Module, batch: ImageBatch) -> LossOutput:
        return added([self._loss(module, part) for part in batch.parts])

    def where(self, inputs: ImageInputs, row: int) -> str:
        return str(inputs.views[row].path)

    def _loss(self, module: nn.Module, part: ImagePart) -> LossOutput:
        options, noising = self.cfg.dreambooth, self.model.noising
        latents = self.model.latents(part)
        alpha, sigma = (table.to(latents.device)[part.level] for table in (noising.alpha, noising.sigma))
        part = replace(part, noise=offset_noise(part.noise, part.offset, options.noise_offset))
        wanted = target(noising.kind, latents, part.noise, alpha, sigma)
        weight = min_snr_weight(noising.kind, alpha, sigma, options.min_snr) if options.min_snr else torch.ones_like(alpha)
        predicted = module(part, mixed(latents, part.noise, alpha, sigma))
        return denoising_loss(predicted, wanted, weight, part.num_instance, self.cfg.prior.weight, part.mask)

    def measure(
        self, module: nn.Module, inputs: ImageInputs, held_out: list[ImageBatch], done: int, check: Callable[[], None]
    ) -> dict[str, float]:
        module.eval()
        found = self.probes.measure(self.model, check)
        if self.accelerator.is_main_process:
            found |= self.painter.paint(self.model, done, check)
        return found

    def save(self, built: DreamboothModel, inputs: ImageInputs, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        kind = save_dreambooth(self.cfg, self.run, built, self.gallery, self.accelerator)
        before = state["before"]
        metrics = after | {f"{name}_before": value for name, value in before.items()}
        for name in ("class", "unrelated"):
            if f"{name}/loss" in after:
                start = before[f"{name}/loss"]
                metrics[f"drift_{name}/percent"] = 100 * (after[f"{name}/loss"] - start) / start
                say(f"drift on {name} images: {metrics[f'drift_{name}/percent']:+.2f} %")
        return built.manifest(self.cfg, self.gallery, kind, state, metrics, self.accelerator)
