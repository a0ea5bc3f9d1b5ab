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
    """The steps of a run of this config."""
    found = objective(cfg)
    return LanguageSteps(found, references if found.needs_reference else None)


def objective(cfg: Dpo) -> Objective[PackedBatch]:
    """The loss of `dpo.loss` on pairs; those of most carry the log-probs of both answers under the reference."""
    dpo, options = cfg.dpo, cfg.dpo.options or {}
    chosen = chosen_loss(dpo.loss, dpo.label_smoothing, options)

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        logps = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
        return preference_loss(
            dpo.loss,
            Pairs(logps, batch.extra.get("reference"), answer_lengths(batch)),
            batch.extra["pair_weight"],
            beta=dpo.beta,
            label_smoothing=dpo.label_smoothing,
            options=options,
        )

    return Objective(pack_pairs, loss, needs_reference=chosen.needs_reference)
