"""The steps of DPO: pairs that share their prompt, compared with what the stage starts from."""

from __future__ import annotations

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack_pairs
from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import chosen_loss, preference_loss
from posttrain.losses.tokens import answer_sums
from posttrain.models.language.objectives import answer_lengths
from posttrain.stages.dpo.config import Dpo
from posttrain.stages.dpo.reference import references
from posttrain.stages.language.stage import LanguageSteps
from posttrain.training.objective import Objective


def steps(cfg: Dpo) -> LanguageSteps:
    """Raises UserError for options that the chosen loss does not have."""
    loss = chosen_loss(cfg.dpo.loss, cfg.dpo.label_smoothing, cfg.dpo.options or {})
    return LanguageSteps(objective(cfg), references if loss.needs_reference else None)


def objective(cfg: Dpo) -> Objective[PackedBatch]:
    """The loss of `dpo.loss` on pairs whose batch carries the log-probs of both answers under the reference, where it needs
    those."""
    options = cfg.dpo

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        logps = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
        return preference_loss(
            options.loss,
            Pairs(logps, batch.extra.get("reference"), answer_lengths(batch)),
            batch.extra["pair_weight"],
            beta=options.beta,
            label_smoothing=options.label_smoothing,
            options=options.options or {},
        )

    return Objective(pack_pairs, loss)
