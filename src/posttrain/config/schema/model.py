"""The model, what is trained of it, and how its frozen part is kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from posttrain.config.choices import Kernels
from posttrain.config.schema.basic import NonNegative, Positive, Rate, Share, Strict


class ModelConfig(Strict):
    name: str  # a hub id, a directory, or one made by the tool: tiny, smollm2
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 if the base is frozen, float32 if it is trained


class LanguageModel(ModelConfig):
    attention: Literal["auto", "documents", "flex", "dense"]  # auto: flex on CUDA, documents elsewhere
    kernels: Kernels  # reference: the plain modules of transformers and peft
    chat_template: str | None  # a file, or chatml; None: the tokenizer's own
    trust_remote_code: bool

    @model_validator(mode="after")
    def _code_is_pinned(self) -> LanguageModel:
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or Path(self.name).expanduser().is_dir()
        if self.trust_remote_code and not pinned:
            raise ValueError("model.trust_remote_code: code from the hub needs model.revision=, a commit of 40 hex digits")
        return self


class Method(Strict):
    """What is trained. output: weights of the model itself, or an adapter in peft's format. is_additive: the change of a layer is
    a sum B A, so it can lie on top of another one, and both are one of summed rank."""

    output: ClassVar[Literal["model", "adapter"]] = "adapter"
    is_additive: ClassVar[bool] = False
    lr_factor: Rate


class Full(Method):
    output = "model"
    method: Literal["none"]


class Head(Method):
    output = "model"
    method: Literal["head"]


class Partial(Method):
    output = "model"
    method: Literal["partial"]
    layers: Rate  # how many at the top, or below 1 their share


class Adapted(Method):
    """With weights of its own, in a dtype of their own."""

    dtype: Literal["float32", "bfloat16"]


class Targeted(Adapted):
    """On linear layers: all-linear, a list of module names, or a regular expression over full names."""

    targets: str | list[str]
    r: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]


class Lora(Targeted):
    is_additive = True
    method: Literal["lora", "qlora", "rslora", "pissa"]
    alpha: Rate


class LoraPlus(Targeted):
    is_additive = True
    method: Literal["loraplus"]
    alpha: Rate
    lr_ratio: Rate  # learning rate of B over that of A


class Dora(Targeted):
    method: Literal["dora"]
    alpha: Rate


class AdaLora(Targeted):
    method: Literal["adalora"]
    alpha: Rate
    init_r: Positive  # every layer's rank at the start; r is their mean at the end
    start: Share  # share of the steps before ranks begin to go
    end: Share  # share of the steps after they have gone
    orthogonality: Annotated[float, Field(ge=0)]  # weight of the penalty on P and Q

    @model_validator(mode="after")
    def _a_time_between(self) -> AdaLora:
        if self.start + self.end >= 1:
            raise ValueError(f"peft.start and peft.end are shares of the run and leave none between ({self.start} + {self.end})")
        if self.r >= self.init_r:
            raise ValueError(f"peft.r: {self.r} is not below peft.init_r={self.init_r}; ranks only go down")
        return self


class Vera(Targeted):
    method: Literal["vera"]
    d_initial: Rate
    seed: NonNegative  # of the frozen random matrices


class Bottleneck(Adapted):
    method: Literal["adapter"]
    r: Positive
    placement: Literal["houlsby", "pfeiffer"]


class Prefix(Adapted):
    method: Literal["prefix"]
    length: Positive


class Ptuning(Adapted):
    method: Literal["ptuning"]
    length: Positive
    hidden: Positive  # width of the prompt encoder


class Prompt(Adapted):
    method: Literal["prompt"]
    length: Positive
    init: Literal["vocabulary", "random"]


PeftConfig = Annotated[
    Full | Head | Partial | Lora | LoraPlus | Dora | AdaLora | Vera | Bottleneck | Prefix | Ptuning | Prompt,
    Field(discriminator="method"),
]


class NoQuant(Strict):
    method: Literal["none"]


class Nf4(Strict):
    method: Literal["nf4"]
    double_quant: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]
    dense_layers: Literal["auto"] | NonNegative  # of which a copy in 16 bits is kept; auto: as many as memory has room for


class Int8(Strict):
    method: Literal["int8"]
    threshold: Annotated[float, Field(ge=0)]  # inputs with a larger magnitude are multiplied in 16 bit


QuantConfig = Annotated[NoQuant | Nf4 | Int8, Field(discriminator="method")]


class ChainConfig(Strict):
    mode: Literal["auto", "stack", "merge", "continue"]
