"""The steps of DreamBooth: pictures of the individual and of its class, and a pipeline that learns the first."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

from accelerate import Accelerator

from posttrain.batch import ImageBatch
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset, fill_dataset
from posttrain.stages.dreambooth.drift import DriftEvaluator
from posttrain.stages.dreambooth.model import DreamboothModel, build_dreambooth
from posttrain.stages.dreambooth.prepare import ImageData, lines_of, read_images
from posttrain.stages.dreambooth.sample_logger import SampleLogger
from posttrain.stages.dreambooth.save import save_dreambooth
from posttrain.stages.dreambooth.training import DreamboothTraining, drift_percent
from posttrain.stages.steps import Context, Outcome, Prepared, Session, Trainable, Training
from posttrain.training.processes import Processes


class Filled(NamedTuple):
    """The dataset, which needs the pipeline, and the model around that."""

    dataset: DreamboothDataset
    model: DreamboothModel


def steps(cfg: Dreambooth) -> DreamboothSteps:
    """The steps of a run of this config."""
    return DreamboothSteps()


class DreamboothSteps:
    """The steps of a run that trains a diffusion model on pictures."""

    def prepare(self, context: Context) -> Prepared[ImageData]:
        """Everything that can be refused before a weight is loaded: pipeline, pictures, captions."""
        data = read_images(context.cfg, context.processes, context.weights)
        identity = {
            "data.content": data.key,
            "train.processes": context.processes,
            "model.weights": data.base.digest,
            "init.parents": [parent.digest for parent in data.parents],
        }
        lines = lines_of(context.cfg, context.directory, data)
        return Prepared(data, identity, data.order, lines, lambda row: str(data.views[row].path))

    def build(self, context: Context, prepared: Prepared[ImageData], accelerator: Accelerator) -> Trainable[Filled]:
        """Class images, latents and embeddings, then the model with what is trained of it."""
        fill = partial(fill_dataset, context.cfg, prepared.data, context.device, context.check)
        dataset = Processes.of(accelerator).in_turn(fill)
        model = build_dreambooth(context.cfg, dataset, prepared.num_steps)
        return Trainable(model.module, Filled(dataset, model), model.trained, model.total)

    def training(
        self, context: Context, prepared: Prepared[ImageData], built: Trainable[Filled], session: Session
    ) -> Training[ImageBatch]:
        """What a step draws, its loss, and what is measured."""
        cfg, (dataset, model) = context.cfg, built.model
        drift = DriftEvaluator(cfg, dataset, model.module.noising)
        samples = SampleLogger(cfg, context.directory, dataset)
        parts = DreamboothTraining(context, dataset, model.module, session, drift, samples)
        return Training(
            updates=parts.updates,
            loss=parts.loss,
            measure=parts.measure,
            compare=drift_percent,
            callback=model.callback,
            unit="images",
        )

    def save(
        self,
        context: Context,
        prepared: Prepared[ImageData],
        built: Trainable[Filled],
        outcome: Outcome,
        accelerator: Accelerator,
    ) -> dict[str, Any]:
        """Write the result; returns the stage's part of the manifest."""
        return save_dreambooth(context, built.model.dataset, built.model.model, outcome, accelerator)
