"""The steps of DPO: pairs that share their prompt, compared with what the stage starts from."""

from __future__ import annotations

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack_pairs
from posttrain.losses.pairs import Pairs
from posttrain.losses.preference import ChosenLoss, chosen_loss
from posttrain.losses.tokens import answer_sums
from posttrain.models.language.objectives import answer_lengths
from posttrain.stages.dpo.config import Dpo
from posttrain.stages.dpo.reference import references
from posttrain.stages.dpo.steps import PreferenceSteps
from posttrain.training.objective import Objective


def steps(cfg: Dpo) -> PreferenceSteps:
    """The steps of a run of this config."""
    found = objective(cfg)
    return PreferenceSteps(found, references if found.needs_reference else None)


def loss_of(cfg: Dpo) -> ChosenLoss:
    """The loss of a config. Raises UserError for what it does not have."""
    dpo = cfg.dpo
    return chosen_loss(dpo.loss, dpo.beta, dpo.label_smoothing, dpo.options)


def lines(cfg: Dpo) -> list[str]:
    """What a run says of its loss before it begins."""
    return [loss_of(cfg).line()]


def objective(cfg: Dpo) -> Objective[PackedBatch]:
    """The loss of `dpo.loss` on pairs; those of most carry the log-probs of both answers under the reference."""
    chosen = loss_of(cfg)

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        logps = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
        return chosen(Pairs(logps, batch.extra.get("reference"), answer_lengths(batch)), batch.extra["pair_weight"])

    return Objective(pack_pairs, loss, needs_reference=chosen.needs_reference)
