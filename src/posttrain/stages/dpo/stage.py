"""The steps of DPO: pairs that share their prompt, compared with what the stage starts from."""

from __future__ import annotations

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack_pairs
from posttrain.losses.preference import dpo_loss
from posttrain.losses.tokens import answer_sums
from posttrain.models.language.objectives import answer_lengths
from posttrain.stages.dpo.config import Dpo
from posttrain.stages.dpo.reference import references
from posttrain.stages.language.stage import LanguageSteps
from posttrain.training.objective import Objective


def steps(cfg: Dpo) -> LanguageSteps:
    return LanguageSteps(objective(cfg), references)


def objective(cfg: Dpo) -> Objective[PackedBatch]:
    """The loss of `dpo.loss` on pairs whose batch carries the log-probs of both answers under the reference."""
    options = cfg.dpo

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        return dpo_loss(
            answer_sums(module(batch), batch.sequence_id, batch.num_answers),
            batch.extra["reference"],
            answer_lengths(batch),
            batch.extra["pair_weight"],
            beta=options.beta,
            kind=options.loss,
            label_smoothing=options.label_smoothing,
        )

    return Objective(pack_pairs, loss)
