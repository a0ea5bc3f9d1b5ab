"""The steps of DPO: pairs that share their prompt, or answers with labels, compared with what the stage starts from."""

from __future__ import annotations

from functools import partial

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack_labelled, pack_pairs
from posttrain.losses.tokens import answer_sums
from posttrain.stages.dpo.config import Dpo
from posttrain.stages.dpo.loss import loss_of
from posttrain.stages.dpo.reference import references
from posttrain.stages.dpo.steps import PreferenceSteps
from posttrain.stages.dpo.whole_step import compared
from posttrain.training.objective import Objective


def steps(cfg: Dpo) -> PreferenceSteps:
    """The steps of a run of this config."""
    found = objective(cfg)
    return PreferenceSteps(found, partial(references, loss_of(cfg), found.pack) if found.needs_reference else None)


def objective(cfg: Dpo) -> Objective[PackedBatch]:
    """The loss of `dpo.loss`; the batches of most carry the log-probs of their answers under the reference."""
    chosen = loss_of(cfg)

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        policy = answer_sums(module(batch), batch.sequence_id, batch.num_answers)
        return chosen(compared(batch, policy, chosen.unpaired), batch.extra["pair_weight"])

    return Objective(pack_labelled if chosen.unpaired else pack_pairs, loss, needs_reference=chosen.needs_reference)
