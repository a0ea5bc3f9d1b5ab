"""The composed config as frozen, typed objects. No defaults here: every default is in a YAML under configs/."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, model_validator


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(gt=0)]


class ModelConfig(Strict):
    name: str  # a hub id, a directory, or one made by the tool: tiny, smollm2
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 if the base is frozen, float32 if it is trained
    attention: Literal["auto", "documents", "flex", "dense"]  # auto: flex on CUDA, documents elsewhere
    chat_template: str | None  # a file, or chatml; None: the tokenizer's own
    trust_remote_code: bool


class NoPeft(Strict):
    method: Literal["none"]
    lr_factor: Rate


class Lora(Strict):
    method: Literal["lora", "qlora"]
    r: Positive
    alpha: Rate
    dropout: Annotated[float, Field(ge=0, lt=1)]
    targets: str | list[str]  # all-linear, a list of module names, or a regular expression
    dtype: Literal["float32", "bfloat16"]  # of the adapter's own weights
    lr_factor: Rate


PeftConfig = Annotated[NoPeft | Lora, Field(discriminator="method")]


class NoQuant(Strict):
    method: Literal["none"]


class Nf4(Strict):
    method: Literal["nf4"]
    double_quant: bool
    compute_dtype: Literal["bfloat16", "float16", "float32"]


QuantConfig = Annotated[NoQuant | Nf4, Field(discriminator="method")]


class DataConfig(Strict):
    path: str  # a file, a hub id, or builtin:reference|questions|preferences|general
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "pairs"]
    subset: str | None  # configuration of a hub data set
    split: str
    revision: str | None
    eval_path: str | None  # None: a share of `path`, chosen by a hash of each row's content
    eval_share: Annotated[float, Field(ge=0, lt=1)]
    eval_rows: NonNegative  # at most so many held-out rows
    max_rows: Positive | None
    max_untrained_share: Share  # more rows without a trained token than this share is an error


class OptimConfig(Strict):
    name: Literal["adamw", "adamw_8bit", "paged_adamw_8bit", "paged_adamw_32bit"]
    lr: Rate
    betas: tuple[Share, Share]
    eps: Rate
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Literal["constant", "linear", "cosine"]
    warmup_ratio: Share
    max_grad_norm: Rate | None


class TrainConfig(Strict):
    max_steps: Positive | None  # optimizer steps; wins over epochs
    epochs: Rate
    batch_size: Positive  # sequences (pairs, packs) a micro-batch, per process
    grad_accum: Positive
    max_length: Annotated[int, Field(ge=8)]
    seed: NonNegative
    log_steps: Positive
    eval_steps: Positive | None
    save_steps: Positive | None
    keep_checkpoints: Positive
    gradient_checkpointing: bool
    precision: Literal["auto", "none", "bf16"]  # autocast; auto: bf16 on CUDA when weights are float32
    processes: Positive
    fsdp: bool


class EvalConfig(Strict):
    sets: dict[str, str] | None  # name -> path; each is measured before and after the stage
    rows: Positive
    max_length: Annotated[int, Field(ge=8)]


class RunConfig(Strict):
    dir: str | None


class DpoConfig(Strict):
    beta: Rate
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]


class LanguageStage(Strict):
    init: str | None
    model: ModelConfig
    peft: PeftConfig
    quant: QuantConfig
    data: DataConfig
    optim: OptimConfig
    train: TrainConfig
    eval: EvalConfig
    run: RunConfig
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
    full_lr: Rate  # rate of full training; a PEFT method multiplies it by its lr_factor

    @model_validator(mode="after")
    def _fits_together(self) -> LanguageStage:
        if self.quant.method != "none" and self.peft.method == "none":
            raise ValueError(f"quant={self.quant.method} cannot be trained in full; add +peft=qlora, or say quant=none")
        if self.quant.method != "none" and self.train.fsdp:
            raise ValueError(f"train.fsdp does not shard a base in {self.quant.method}; say quant=none, or train.fsdp=false")
        return self


class Cpt(LanguageStage):
    stage: Literal["cpt"]


class Sft(LanguageStage):
    stage: Literal["sft"]


class Dpo(LanguageStage):
    stage: Literal["dpo"]
    dpo: DpoConfig


StageConfig = Annotated[Cpt | Sft | Dpo, Field(discriminator="stage")]
STAGE_CONFIG: TypeAdapter[Any] = TypeAdapter(StageConfig)
