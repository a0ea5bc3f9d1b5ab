"""The steps of a reward model: a score at the end of turn of both answers of a pair."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.console import say
from posttrain.data.collate import pack_pairs
from posttrain.evaluation.calibration import score_summary
from posttrain.losses.reward import reward_loss
from posttrain.models.hub import resolve
from posttrain.models.language.architecture import classifier_of, config_of
from posttrain.models.language.objectives import answer_lengths
from posttrain.models.trust import pin_of
from posttrain.runs.artifact import HEAD_FILE, open_artifact
from posttrain.stages.language.init import resolve_start
from posttrain.stages.language.prepare import PreparedData, with_parents
from posttrain.stages.language.stage import LanguageSteps
from posttrain.stages.rm.config import Rm
from posttrain.stages.rm.policy_pairs import PAIRS, own_pairs
from posttrain.stages.steps import Context, Prepared
from posttrain.training.objective import Objective


def steps(cfg: Rm) -> RewardSteps:
    """The steps of a run of this config, on given pairs or on a policy's own."""
    return (PolicyPairSteps if cfg.rm.policy else RewardSteps)(objective(cfg))


def objective(cfg: Rm) -> Objective[PackedBatch]:
    """Scores of both answers of a pair, and what all held-out pairs say together."""

    def loss(module: nn.Module, batch: PackedBatch) -> LossOutput:
        output = reward_loss(module(batch), batch.extra["margin"], batch.extra["pair_weight"], centering=cfg.rm.centering)
        lengths = answer_lengths(batch)
        return replace(output, rows={**output.rows, "chosen_tokens": lengths[0::2], "rejected_tokens": lengths[1::2]})

    return Objective(pack_pairs, loss, summary=score_summary, scores=True)


def head_beside(model: Any) -> str:
    """Of a base with this config of transformers': that its reward model is no class of theirs; '' where it is one."""
    if classifier_of(model) is not None:
        return ""
    return (
        f"transformers has no sequence classifier for {model.model_type}: the reward model is saved as the language model with "
        f"its head beside it in {HEAD_FILE} (docs/rlhf.md says how others load it)"
    )


@dataclass(frozen=True)
class RewardSteps(LanguageSteps):
    """On given pairs."""

    def prepare(self, context: Context) -> Prepared[PreparedData]:
        """As for other stages, after it is said what the run will leave."""
        cfg: Rm = context.cfg
        if context.weights:
            directory = resolve(resolve_start(cfg, weights=False).source, cfg.model.revision, weights=False).directory
            if line := head_beside(config_of(directory, pin_of(cfg.model))):
                say(line)
        return super().prepare(context)


@dataclass(frozen=True)
class PolicyPairSteps(RewardSteps):
    """On pairs that a policy writes first (`rm.policy`)."""

    def prepare(self, context: Context) -> Prepared[PreparedData]:
        """As for other stages, after the policy has written the pairs."""
        cfg: Rm = context.cfg
        if not context.weights:  # a plan has the policy write nothing
            return super().prepare(context)
        policy = open_artifact(str(cfg.rm.policy), "rm.policy").parents("policy")
        place = context.own(PAIRS, cfg.model_dump(), [parent.digest for parent in policy])
        written = cfg.model_copy(update={"data": own_pairs(cfg, place)})
        return with_parents(super().prepare(replace(context, cfg=written)), policy)
