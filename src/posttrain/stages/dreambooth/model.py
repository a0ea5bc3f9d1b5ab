"""2. From a dataset to the model that is trained on it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from posttrain.models.counting import count_parameters
from posttrain.models.diffusion.denoiser import trained_parts
from posttrain.models.diffusion.families import DiffusionModel, text_encoders
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset
from posttrain.training.callbacks import StepCallback
from posttrain.training.seeding import seed_step


@dataclass(frozen=True)
class DreamboothModel:
    """The model that a run trains and leaves. trained, total: counts of parameters, of the parts that are trained. callback: what
    the method does in every optimizer step."""

    module: DiffusionModel
    trained: int
    total: int
    dtype: torch.dtype
    callback: StepCallback | None


def build_dreambooth(cfg: Dreambooth, dataset: DreamboothDataset, num_steps: int) -> DreamboothModel:
    """Put the method on the pipeline's denoiser, and on its text encoders if those are trained; let go of what is done with.

    Raises UserError for targets that match nothing, or ranks that do not fit.
    """
    options = cfg.dreambooth
    seed_step(cfg.train.seed, 0, 0)  # a new adapter's random half is the run's own
    parts = trained_parts(dataset.pipe, cfg.peft, options.text_encoder, num_steps, cfg.train.gradient_checkpointing is True)
    encoded = cfg.data.cache and not options.text_encoder
    if encoded:
        for name in text_encoders(dataset.pipe):
            setattr(dataset.pipe, name, None)
    module = DiffusionModel(dataset.pipe, dataset.captions, dataset.texts if encoded else None, parts)
    return DreamboothModel(module, *count_parameters(module), dataset.dtype, cfg.peft.step_callback(module.denoiser))
