"""The stage's steps: those of language models, around one objective."""

from dataclasses import replace

from torch import nn

from my_posttrain.half.config import Half
from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack
from posttrain.losses.tokens import token_loss
from posttrain.stages.language.stage import LanguageSteps
from posttrain.training.objective import Objective


def steps(cfg: Half) -> LanguageSteps:
    """A loss is a sum over the tokens of a micro-batch and their count; the step divides once."""

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        output = token_loss(module(batch), batch.weight)
        total, count = output.metrics["loss"]
        scaled = {**output.metrics, "loss": (cfg.half.scale * total, count)}
        return replace(output, total=cfg.half.scale * output.total, metrics=scaled)

    return LanguageSteps(Objective(pack, loss))
