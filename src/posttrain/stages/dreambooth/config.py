"""The config of DreamBooth, and what of it does not go together."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.schema import DreamboothConfig, DriftConfig, ImageData, PriorConfig, Rate, SampleConfig, Stage


class Dreambooth(Stage):
    """Config of `posttrain dreambooth`."""

    data: ImageData
    prior: PriorConfig
    dreambooth: DreamboothConfig
    sample: SampleConfig
    eval: DriftConfig
    lora_lr: Rate

    @model_validator(mode="after")
    def _can_learn(self) -> Dreambooth:
        data = self.data
        if data.instance_dir is None:
            raise ValueError("data.instance_dir: nothing to learn from; give a folder with 3 to 10 pictures of the individual")
        if data.instance_prompt is None and data.captions == "prompt":
            raise ValueError('data.instance_prompt: say what the pictures show, with a rare word of its own: "a sks dog"')
        if self.prior.weight > 0 and not data.class_prompt:
            raise ValueError(
                f'data.class_prompt: prior.weight={self.prior.weight:g} needs one, such as "a dog"; '
                "give it, or say prior.weight=0"
            )
        if not self.peft.for_images:
            raise ValueError(
                f"peft: {self.peft.name} is a method of language models; use +peft=lora, a variant of it, or full training"
            )
        if not self.quant.for_images:
            raise ValueError(f"quant={self.quant.name} is of language models; say quant=nf4")
        if self.quant.kept_dense:
            raise ValueError("quant.dense_layers is of language models; say quant.dense_layers=0")
        if self.train.fsdp:
            raise ValueError("train.fsdp shards language models; say train.fsdp=false")
        return self
