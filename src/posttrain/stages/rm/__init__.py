"""Reward model on preference pairs (Bradley-Terry; Stiennon et al. 2020, arXiv 2009.01325)."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import INIT, OF_ALL, OF_LANGUAGE, Parent, StageSpec

SPEC = StageSpec(
    name="rm",
    position=3,
    about="Reward model on preference pairs.",
    examples=("+peft=qlora init=runs/sft/RUN data.path=pairs.jsonl", "+peft=lora init=runs/sft/RUN rm.centering=0.01"),
    settings=(*OF_LANGUAGE, ("rm.centering=0.01", "rm.policy, rm.rule: pairs of the policy's own answers"), *OF_ALL),
    config="posttrain.stages.rm.config:Rm",
    steps="posttrain.stages.rm.stage:steps",
    rows=RowUse("rm", ("pairs",), "scored_pairs", "prompt, chosen and rejected"),
    parents=(INIT, Parent("rm.policy", "policy")),
    measured_by="posttrain.stages.rm.stage:objective",
    plan="posttrain.stages.rm.plan",
    figures=(
        "loss",
        "accuracy",
        "accuracy_low",
        "accuracy_high",
        "margin",
        "score_chosen",
        "score_rejected",
        "score_std",
        "calibration_error",
        "length_correlation",
    ),
)
