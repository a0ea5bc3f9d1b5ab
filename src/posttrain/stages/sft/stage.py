"""The steps of supervised fine-tuning: the assistant's tokens count."""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.config.choices import TOKEN_LOSSES
from posttrain.config.schema import SftConfig
from posttrain.losses.tokens import shaped_token_loss
from posttrain.models.language.objectives import TOKENS
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.sft.config import Sft
from posttrain.training.objective import LossFunction


def steps(cfg: Sft) -> LanguageSteps:
    """The steps of a run of this config. What is measured is the plain loss, whatever is trained by."""
    return LanguageSteps(TOKENS if cfg.sft.is_plain else replace(TOKENS, training_loss=loss_of(cfg.sft)))


def loss_of(sft: SftConfig) -> LossFunction[PackedBatch]:
    """The loss of training as `sft` says."""
    chosen, noise = TOKEN_LOSSES.get(sft.loss), sft.neftune_noise_alpha or 0.0

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        found = module(batch, spread=sft.spread, noise=noise)
        logps, spread = (found[0], found[1:]) if sft.spread else (found, None)
        return shaped_token_loss(chosen, logps, batch.weight, sft.label_smoothing, sft.z_loss, spread)

    return loss
