"""A stage: supervised fine-tuning whose loss is scaled."""

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import OF_ALL, OF_LANGUAGE, StageSpec

SPEC = StageSpec(
    name="half",
    position=99,
    about="Half of supervised fine-tuning.",
    examples=("model=tiny", "model=tiny half.scale=0.25"),
    settings=OF_LANGUAGE + OF_ALL,
    config="my_posttrain.half.config:Half",
    steps="my_posttrain.half.steps:steps",
    rows=RowUse("half", ("messages",), "conversations", "messages"),
)
