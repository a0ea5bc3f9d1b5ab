"""Continued pre-training: next token on every token of a corpus (Gururangan et al. 2020, arXiv 2004.10964)."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import OF_ALL, OF_LANGUAGE, StageSpec

SPEC = StageSpec(
    name="cpt",
    position=1,
    about="Continued pre-training on documents.",
    examples=("+peft=qlora data.path=corpus.jsonl", "+peft=lora data.path=corpus.jsonl train.max_length=2048"),
    settings=OF_LANGUAGE + OF_ALL,
    config="posttrain.stages.cpt.config:Cpt",
    steps="posttrain.stages.cpt.stage:steps",
    rows=RowUse("cpt", ("text",), "documents", "a text column"),
    figures=("loss", "perplexity"),
)
