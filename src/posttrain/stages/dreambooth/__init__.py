"""DreamBooth: a text-to-image model learns one individual, and keeps its class (Ruiz et al. 2022, arXiv 2208.12242)."""

from __future__ import annotations

from posttrain.stages.spec import OF_ALL, StageSpec

SPEC = StageSpec(
    name="dreambooth",
    position=6,
    about="A text-to-image model learns one individual from a few pictures.",
    examples=(
        "+peft=qlora data.instance_dir=photos/ data.instance_prompt='a sks dog' data.class_prompt='a dog'",
        "+peft=lora data.instance_dir=photos/ data.instance_prompt='a sks dog' prior.weight=0",
    ),
    settings=(
        ("model=sd15", "or tiny, sdxl, sd3, flux; model.name=ORG/NAME or a pipeline's directory"),
        ("init=null", "a finished full run to go on from, a hub id or a path"),
        ("+peft=qlora", "or lora; without it every weight is trained. peft.r, peft.alpha, peft.targets"),
        ("data.instance_dir=DIR", "pictures of one individual; data.instance_prompt, data.class_prompt"),
        ("train.max_steps=800", "train.batch_size, train.grad_accum"),
        ("prior.weight=1", "of class images; prior.images, sample.images, dreambooth.text_encoder"),
        *OF_ALL,
    ),
    config="posttrain.stages.dreambooth.config:Dreambooth",
    steps="posttrain.stages.dreambooth.stage:steps",
    rows=None,
    files=("data.instance_dir", "data.class_dir", "data.mask"),
    reads="images",
    figures=("loss", "clip_i", "clip_t", "dino"),
)
