"""Samples while a DreamBooth run goes on: the same prompts and seeds at every evaluation, so that change is the model's."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from posttrain.console import Meter
from posttrain.data.images.folder import as_image, read_view
from posttrain.evaluation.image_similarity import Similarity
from posttrain.models.diffusion.families import DiffusionModel, encode_texts
from posttrain.models.diffusion.image_generation import Drawing, draw
from posttrain.runs.files import write_json
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset

SEED = 7_000_000  # far from those of class images


class SampleLogger:
    """samples/step-000200/0-instance-0.png, ..., and samples/index.json, which says what they are."""

    def __init__(self, cfg: Dreambooth, run_dir: Path, dataset: DreamboothDataset) -> None:
        self.cfg, self.folder, self.dataset = cfg, run_dir / "samples", dataset
        side = dataset.inputs.framing.side
        sample = cfg.sample
        self.similarity = Similarity(cfg.eval.clip, cfg.eval.dino)
        self.how = Drawing(side, side, sample.inference_steps, sample.guidance, sample.batch_size)

    def log(self, model: DiffusionModel, done: int, check: Callable[[], None]) -> dict[str, float]:
        """Draw all prompts as the model is after `done` steps; how like the individual its samples are."""
        sample, dataset = self.cfg.sample, self.dataset
        if not sample.images:
            return {}
        prompts = dataset.prompts()
        rows = [(number, i) for number in range(len(prompts)) for i in range(sample.images)]
        texts = self._texts(model, [prompts[number][1] for number, _ in rows])
        seeds = [self.cfg.train.seed + SEED + i for _, i in rows]
        batches = -(-len(rows) // self.how.batch_size)
        with Meter("samples", batches) as meter:

            def advance() -> None:
                meter.advance()
                check()

            images = draw(dataset.pipe, texts, dataset.negative, seeds, self.how, advance)
        self._keep(prompts, rows, images, done)
        photos = [as_image(read_view(view, dataset.inputs.background)[0]) for view in dataset.inputs.views]
        found = self.similarity.measure(images[: sample.images], photos, prompts[0][1])  # the individual's prompt comes first
        return {f"eval/{name}": value for name, value in found.items()}

    def _texts(self, model: DiffusionModel, prompts: list[str]) -> dict[str, torch.Tensor]:
        if model.trains_text:
            with torch.no_grad():
                return encode_texts(self.dataset.pipe, prompts)
        numbers = torch.tensor(self.dataset.numbers(prompts))
        return {name: value[numbers.to(value.device)] for name, value in self.dataset.texts.items()}

    def _keep(self, prompts: list[tuple[str, str]], rows: list[tuple[int, int]], images: list[Any], done: int) -> None:
        folder = self.folder / f"step-{done:06d}"
        folder.mkdir(parents=True, exist_ok=True)
        for (number, i), image in zip(rows, images, strict=True):
            image.save(folder / f"{number}-{prompts[number][0]}-{i}.png")
        write_json(self.folder / "index.json", [{"kind": kind, "prompt": prompt} for kind, prompt in prompts])
