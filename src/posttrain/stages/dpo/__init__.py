"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290), with the stage's own start as the reference."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import OF_ALL, OF_LANGUAGE, StageSpec

SPEC = StageSpec(
    name="dpo",
    position=5,
    about="Preference losses: DPO and others on pairs, KTO and BCO on labelled answers.",
    examples=("+peft=qlora init=runs/sft/RUN data.path=pairs.jsonl", "+peft=lora init=runs/sft/RUN dpo.beta=0.05"),
    settings=(
        *OF_LANGUAGE,
        ("dpo.loss=sigmoid", "or ipo, simpo, orpo, kto, ...; dpo.beta, dpo.label_smoothing, dpo.options"),
        *OF_ALL,
    ),
    config="posttrain.stages.dpo.config:Dpo",
    steps="posttrain.stages.dpo.stage:steps",
    rows=RowUse("dpo", ("pairs",), "pairs", "prompt, chosen and rejected"),
    rows_by="posttrain.stages.dpo.loss:rows",
    says="posttrain.stages.dpo.loss:lines",
    plan="posttrain.stages.dpo.plan",
    figures=("loss", "loss_*", "accuracy", "margin", "logp_chosen", "logp_rejected", "reward_chosen", "reward_rejected", "kl"),
)
