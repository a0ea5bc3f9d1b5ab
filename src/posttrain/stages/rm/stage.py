"""Reward model on preference pairs (Bradley-Terry; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import Rm
from posttrain.evaluation.held_out import reward_task
from posttrain.runs.artifact import open_artifact
from posttrain.runs.directory import Run
from posttrain.stages.language.build import PreparedData
from posttrain.stages.language.stage import LanguageRun, run_language
from posttrain.stages.rm.policy_pairs import own_pairs


def run(cfg: Rm, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    if cfg.rm.policy:
        cfg = cfg.model_copy(update={"data": own_pairs(cfg, run)})
    return run_language(cfg, run, reward_task(cfg.rm.centering), RmRun)


class RmRun(LanguageRun):
    cfg: Rm  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self, inputs: PreparedData) -> None:
        if self.cfg.rm.policy:
            inputs.start.parents.extend(open_artifact(self.cfg.rm.policy, "rm.policy").parents("policy"))
