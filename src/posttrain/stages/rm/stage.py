"""The steps of a reward model: a score at the end of turn of both answers of a pair."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.data.collate import pack_pairs
from posttrain.evaluation.calibration import score_summary
from posttrain.losses.reward import reward_loss
from posttrain.models.language.objectives import answer_lengths
from posttrain.runs.artifact import open_artifact
from posttrain.stages.language.prepare import PreparedData, prepare_language, with_parents
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.rm.config import Rm
from posttrain.stages.rm.policy_pairs import own_pairs
from posttrain.stages.steps import Context, Prepared
from posttrain.training.objective import Objective


def steps(cfg: Rm) -> LanguageSteps:
    """The steps of a run of this config, on given pairs or on a policy's own."""
    return PolicyPairSteps(objective(cfg)) if cfg.rm.policy else LanguageSteps(objective(cfg))


def objective(cfg: Rm) -> Objective[PackedBatch]:
    """Scores of both answers of a pair, and what all held-out pairs say together."""

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        output = reward_loss(module(batch), batch.extra["margin"], batch.extra["pair_weight"], centering=cfg.rm.centering)
        lengths = answer_lengths(batch)
        return replace(output, rows={**output.rows, "chosen_tokens": lengths[0::2], "rejected_tokens": lengths[1::2]})

    return Objective(pack_pairs, loss, summary=score_summary, scores=True)


@dataclass(frozen=True)
class PolicyPairSteps(LanguageSteps):
    """On pairs that a policy writes first (`rm.policy`)."""

    def prepare(self, context: Context) -> Prepared[PreparedData]:
        """As for other stages, after the policy has written the pairs."""
        cfg: Rm = context.cfg
        if not context.weights:  # a plan has the policy write nothing
            return prepare_language(context)
        written = cfg.model_copy(update={"data": own_pairs(cfg, context.directory)})
        policy = open_artifact(str(cfg.rm.policy), "rm.policy").parents("policy")
        return with_parents(prepare_language(replace(context, cfg=written)), policy)
