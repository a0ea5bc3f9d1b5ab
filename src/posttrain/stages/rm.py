"""Reward model on preference pairs (Bradley-Terry; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.after.measure import reward_task
from posttrain.config.schema import Rm
from posttrain.rundir import Run, parent_record
from posttrain.stages.build import Inputs
from posttrain.stages.language import LanguageRun, run_language
from posttrain.stages.preferences import own_pairs


def run(cfg: Rm, run: Run) -> dict[str, Any]:
    """Train to the end, or go on; returns the manifest."""
    if cfg.rm.policy:
        cfg = cfg.model_copy(update={"data": own_pairs(cfg, run)})
    return run_language(cfg, run, reward_task(cfg.rm.centering), RmRun)


class RmRun(LanguageRun):
    cfg: Rm  # pyright: ignore[reportIncompatibleVariableOverride]

    def check(self, inputs: Inputs) -> None:
        if self.cfg.rm.policy:
            inputs.start.parents.append(parent_record("policy", Path(self.cfg.rm.policy).expanduser().resolve()))
