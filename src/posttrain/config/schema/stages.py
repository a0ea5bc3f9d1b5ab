"""The config of a run, by stage, and what of it does not go together."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, model_validator

from posttrain.config.schema.basic import Rate, Strict
from posttrain.config.schema.data import DataConfig
from posttrain.config.schema.images import DreamboothConfig, DriftConfig, ImageData, PriorConfig, SampleConfig
from posttrain.config.schema.language import (
    CotConfig,
    CurriculumConfig,
    DpoConfig,
    EwcConfig,
    ForgettingConfig,
    PpoConfig,
    RewardConfig,
    RmConfig,
    RolloutConfig,
    WeightsConfig,
)
from posttrain.config.schema.model import ChainConfig, LanguageModel, ModelConfig, PeftConfig, QuantConfig
from posttrain.config.schema.training import EvalConfig, LanguageTrain, OptimConfig, ResumeConfig, RunConfig, TrainConfig


class Stage(Strict):
    init: str | None
    model: ModelConfig
    peft: PeftConfig
    quant: QuantConfig
    optim: OptimConfig
    train: TrainConfig
    run: RunConfig
    resume: ResumeConfig
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
    full_lr: Rate  # rate of full training; a PEFT method multiplies it by its lr_factor

    @model_validator(mode="after")
    def _fits_together(self) -> Stage:
        if self.quant.method != "none" and (self.peft.output == "model" or self.peft.method == "pissa"):
            how = {"none": "in full", "pissa": "by pissa, which writes into the base"}.get(
                self.peft.method, f"by {self.peft.method}"
            )
            raise ValueError(f"quant={self.quant.method} cannot be trained {how}; add +peft=qlora, or say quant=none")
        if self.quant.method == "int8" and self.peft.method == "dora":
            raise ValueError("quant=int8 cannot be trained by dora, which has to read the whole weight; say quant=nf4")
        if self.quant.method != "none" and self.train.fsdp:
            raise ValueError(f"train.fsdp does not shard a base in {self.quant.method}; say quant=none, or train.fsdp=false")
        if self.train.fsdp and not (self.peft.output == "model" or self.peft.is_additive):
            raise ValueError(f"train.fsdp does not shard peft={self.peft.method}; use peft=lora, or train.fsdp=false")
        return self

    @property
    def base_dtype(self) -> str:
        """Of a frozen base 16 bit, of weights that are trained (or that PiSSA writes into) 32, unless the user says otherwise."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.peft.output == "model" or self.peft.method == "pissa" else "bfloat16"


class LanguageStage(Stage):
    model: LanguageModel  # pyright: ignore[reportIncompatibleVariableOverride]
    train: LanguageTrain  # pyright: ignore[reportIncompatibleVariableOverride]
    chain: ChainConfig
    data: DataConfig
    eval: EvalConfig

    @property
    def example_length(self) -> int:
        """Tokens that a row of data may have."""
        return self.train.max_length

    @model_validator(mode="after")
    def _dense_copies_are_read(self) -> LanguageStage:
        if self.model.kernels == "reference" and self.quant.method == "nf4" and self.quant.dense_layers not in ("auto", 0):
            raise ValueError("quant.dense_layers: model.kernels=reference reads no dense copies; say quant.dense_layers=0")
        return self


class Guarded(LanguageStage):
    """A stage that can forget, and mind it."""

    ewc: EwcConfig
    curriculum: CurriculumConfig
    forgetting: ForgettingConfig

    @model_validator(mode="after")
    def _can_be_held(self) -> Guarded:
        if self.ewc.lam and self.train.fsdp:
            raise ValueError("ewc.lambda: its start and Fisher are not sharded; say train.fsdp=false")
        if self.forgetting.budget is not None and "general" not in (self.eval.sets or {}):
            raise ValueError("forgetting.budget: it is of the set eval.sets.general, and there is none")
        if self.forgetting.budget is not None and self.train.save_steps is None:
            raise ValueError("forgetting.budget: it is looked at when a checkpoint is saved; give train.save_steps")
        return self


class Cpt(Guarded):
    stage: Literal["cpt"]


class Sft(Guarded):
    stage: Literal["sft"]
    cot: CotConfig
    weights: WeightsConfig

    @model_validator(mode="after")
    def _marked(self) -> Sft:
        if self.cot.marker is None and self.cot.reasoning_weight != self.cot.answer_weight:
            raise ValueError("cot.marker: give the text that ends the reasoning, such as cot.marker='</think>' or ####")
        return self


class Dpo(Guarded):
    stage: Literal["dpo"]
    dpo: DpoConfig


class Rm(LanguageStage):
    stage: Literal["rm"]
    rm: RmConfig


class Ppo(LanguageStage):
    stage: Literal["ppo"]
    init_reward: str | None
    ppo: PpoConfig
    rollout: RolloutConfig
    reward: RewardConfig

    @property
    def example_length(self) -> int:
        return self.train.max_length - self.rollout.max_new_tokens

    @model_validator(mode="after")
    def _prompts_have_no_weights(self) -> Ppo:
        sources = {"data": self.data, **{f"data.sources.{name}": each for name, each in (self.data.sources or {}).items()}}
        for key, source in sources.items():
            if source.quality == "weight":
                raise ValueError(f"{key}.quality: ppo has prompts, which have no weights; say {key}.quality=filter")
        return self

    @model_validator(mode="after")
    def _can_learn(self) -> Ppo:
        given = bool(self.init_reward) + len(self.reward.function)
        if not given:
            raise ValueError("init_reward: nothing gives a reward; give a reward model's run, or reward.function=module:name")
        if self.reward.weights is not None and len(self.reward.weights) != given:
            raise ValueError(f"reward.weights: {len(self.reward.weights)} weights for {given} rewards (init_reward comes first)")
        if self.ppo.advantage != "gae" and self.ppo.samples < 2:
            raise ValueError(f"ppo.samples: {self.ppo.advantage} compares answers to one prompt; say ppo.samples=4")
        if self.ppo.minibatches > self.train.grad_accum:
            raise ValueError(
                f"ppo.minibatches: a step's train.grad_accum={self.train.grad_accum} micro-batches cannot be dealt into "
                f"{self.ppo.minibatches}; raise train.grad_accum"
            )
        if self.example_length < 1:
            raise ValueError(
                f"rollout.max_new_tokens: {self.rollout.max_new_tokens} leave no room for a prompt within "
                f"train.max_length={self.train.max_length}; raise train.max_length"
            )
        if self.train.processes > 1 or self.train.fsdp:
            raise ValueError("train.processes: ppo runs in one process; say train.processes=1 train.fsdp=false")
        if self.peft.method in ("adalora", "prefix", "prompt", "ptuning"):
            raise ValueError(f"peft: ppo cannot train {self.peft.method}; use +peft=lora, another adapter, or full training")
        if self.rollout.engine == "vllm" and not (
            self.peft.is_additive and self.peft.method != "pissa" and self.quant.method == "none"
        ):
            raise ValueError(
                "rollout.engine: vllm is handed a LoRA over a base in 16 bit; say +peft=lora quant=none, or rollout.engine=model"
            )
        return self


class Dreambooth(Stage):
    stage: Literal["dreambooth"]
    data: ImageData
    prior: PriorConfig
    dreambooth: DreamboothConfig
    sample: SampleConfig
    eval: DriftConfig
    lora_lr: Rate

    @model_validator(mode="after")
    def _can_learn(self) -> Dreambooth:
        data, method = self.data, self.peft.method
        if data.instance_dir is None:
            raise ValueError("data.instance_dir: nothing to learn from; give a folder with 3 to 10 pictures of the individual")
        if data.instance_prompt is None and data.captions == "prompt":
            raise ValueError('data.instance_prompt: say what the pictures show, with a rare word of its own: "a sks dog"')
        if self.prior.weight > 0 and not data.class_prompt:
            raise ValueError(
                f'data.class_prompt: prior.weight={self.prior.weight:g} needs one, such as "a dog"; '
                "give it, or say prior.weight=0"
            )
        if method in ("head", "partial", "adapter", "prefix", "ptuning", "prompt"):
            raise ValueError(f"peft: {method} is a method of language models; use +peft=lora, a variant of it, or full training")
        if self.quant.method == "int8":
            raise ValueError("quant=int8 is of language models; say quant=nf4")
        if self.quant.method == "nf4" and self.quant.dense_layers:
            raise ValueError("quant.dense_layers is of language models; say quant.dense_layers=0")
        if self.train.fsdp:
            raise ValueError("train.fsdp shards language models; say train.fsdp=false")
        return self


StageConfig = Annotated[Cpt | Sft | Rm | Ppo | Dpo | Dreambooth, Field(discriminator="stage")]
STAGE_CONFIG: TypeAdapter[Any] = TypeAdapter(StageConfig)
STAGES: dict[str, type[Stage]] = {
    get_args(stage.model_fields["stage"].annotation)[0]: stage for stage in get_args(get_args(StageConfig)[0])
}
