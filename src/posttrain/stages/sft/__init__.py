"""Supervised fine-tuning: next token on the assistant's tokens (Ouyang et al. 2022, arXiv 2203.02155)."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import OF_ALL, OF_LANGUAGE, StageSpec

SPEC = StageSpec(
    name="sft",
    position=2,
    about="Supervised fine-tuning on conversations.",
    examples=("+peft=qlora data.path=chat.jsonl", "+peft=lora -m peft.r=4,8,16 peft.alpha=16,32"),
    settings=(
        *OF_LANGUAGE,
        ("cot.marker=null", "text before the final answer, such as '####'; cot.reasoning_weight, weights.gamma"),
        ("eval.generate.prompts=0", "held-out prompts that are answered at every evaluation; eval.generate.metrics=[f1]"),
        *OF_ALL,
    ),
    config="posttrain.stages.sft.config:Sft",
    steps="posttrain.stages.sft.stage:steps",
    rows=RowUse(
        "sft",
        takes=("messages", "prompt_completion", "text"),
        examples="conversations",
        needs="messages, instruction and output, or prompt and completion",
    ),
    figures=("loss", "perplexity"),
)
