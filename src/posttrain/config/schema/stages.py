"""What the configs of several stages have in common, and what of it does not go together. Each stage's own is in its folder."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import model_validator

from posttrain.config.fields import Rate, Strict
from posttrain.config.interfaces import METHODS, READS
from posttrain.config.metrics import TASKS
from posttrain.config.schema.data import DataConfig
from posttrain.config.schema.language import CotConfig, CurriculumConfig, EwcConfig, ForgettingConfig, WeightsConfig
from posttrain.config.schema.launch import LaunchConfig
from posttrain.config.schema.model import ChainConfig, LanguageModel, ModelConfig, PeftConfig, QuantConfig
from posttrain.config.schema.training import (
    EvalConfig,
    LanguageTrain,
    OptimConfig,
    ResumeConfig,
    RunConfig,
    TrackConfig,
    TrainConfig,
)


class Stage(Strict):
    """What every stage has."""

    stage: str
    init: str | None
    model: ModelConfig
    peft: PeftConfig
    quant: QuantConfig
    optim: OptimConfig
    train: TrainConfig
    launch: LaunchConfig
    run: RunConfig
    resume: ResumeConfig
    tracker: Literal["none", "tensorboard", "wandb", "trackio", "mlflow"]
    track: TrackConfig
    full_lr: Rate  # rate of full training; a PEFT method multiplies it by its lr_factor
    gives: ClassVar[frozenset[str]] = frozenset()  # of what a method may read for its first values (models/peft/starts.py)

    @model_validator(mode="after")
    def _fits_together(self) -> Stage:
        self.peft.check_base(self.quant)
        if self.peft.reads and self.peft.reads not in self.gives:
            how = f"what is trained by {self.peft.named} begins by {READS[self.peft.reads]}"
            raise ValueError(f"peft.init: {how}, which {self.stage} does not give; say peft.init=default")
        if self.peft.reads and self.train.fsdp:
            why = f"a base that is sharded is not read before it is trained by {self.peft.named}"
            raise ValueError(f"train.fsdp: {why}; say peft.init=default, or train.fsdp=false")
        self.optim.check(self.peft, self.train.fsdp)
        for key in ("id", "artifacts") if self.tracker == "tensorboard" else ():
            if getattr(self.track, key):
                raise ValueError(f"track.{key}: tensorboard has none; leave it out, or say tracker=wandb, trackio or mlflow")
        self.launch.check(self.train.launcher, self.train.processes)
        if self.quant.is_quantized and self.train.fsdp:
            raise ValueError(f"train.fsdp does not shard a base in {self.quant.name}; say quant=none, or train.fsdp=false")
        if self.base_dtype == "float16" and (self.peft.writes_base or self.peft.output == "model"):
            raise ValueError(
                "model.dtype: float16 is too coarse for weights that are trained; say model.dtype=float32, or peft=lora"
            )
        if self.train.fsdp and not self.peft.for_fsdp:
            raise ValueError(f"train.fsdp does not shard peft={self.peft.name}; use peft=lora, or train.fsdp=false")
        return self

    @property
    def base_dtype(self) -> str:
        """Of a frozen base 16 bit, of weights that are trained or written into 32, unless the user says otherwise."""
        if self.model.dtype != "auto":
            return self.model.dtype
        return "float32" if self.peft.writes_base else "bfloat16"


class LanguageStage(Stage):
    """What all stages of language models have."""

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
        if self.model.kernels == "reference" and self.quant.kept_dense not in ("auto", 0):
            raise ValueError("quant.dense_layers: model.kernels=reference reads no dense copies; say quant.dense_layers=0")
        return self

    @model_validator(mode="after")
    def _activations_can_go(self) -> LanguageStage:
        if self.train.offload == "activations" and self.train.fsdp:
            raise ValueError("train.offload: activations of sharded layers stay; say train.offload=none, or train.fsdp=false")
        return self

    @model_validator(mode="after")
    def _can_answer(self) -> LanguageStage:
        if self.eval.generate.prompts and self.train.fsdp:
            raise ValueError("eval.generate.prompts: sharded layers write no answers; say eval.generate.prompts=0")
        if self.eval.generate.prompts and self.train.offload == "layers":
            raise ValueError("eval.generate.prompts: each token would read all layers; say it 0, or train.offload=none")
        return self

    @model_validator(mode="after")
    def _can_be_asked(self) -> LanguageStage:
        harness, of_tasks = self.eval.harness, (self.train.judged_by or "").startswith(f"{TASKS}/")
        if not self.eval.tasks:
            if of_tasks or harness.every or harness.include:
                raise ValueError("eval.tasks: none is named; give eval.tasks=[gsm8k], say, or leave out what is about them")
            return self
        if self.train.fsdp or self.train.offload == "layers":
            raise ValueError("eval.tasks: lm-eval asks a whole model; say train.fsdp=false train.offload=none, or eval.tasks=[]")
        if harness.every and self.train.eval_steps is None:
            raise ValueError("eval.harness.every: it is in evaluations, and there is none; give train.eval_steps")
        if of_tasks and harness.every != 1:
            raise ValueError(f"eval.harness.every: {self.train.judged_by} is to be there at each evaluation; say it 1")
        return self

    @model_validator(mode="after")
    def _layers_can_go(self) -> LanguageStage:
        if self.train.offload != "layers":
            return self
        start = "train.offload: layers"
        if self.peft.reads:
            raise ValueError(f"{start} are not there when it is trained by {self.peft.named}; say peft.init=default")
        if self.peft.output == "model" or self.peft.writes_base:
            raise ValueError(f"{start} of a frozen base come and go, and it is trained {self.peft.in_words}; use peft=lora")
        if not self.quant.comes_and_goes:
            raise ValueError(f"{start} in {self.quant.name} do not come and go; say quant=nf4, or train.offload=none")
        if not (self.train.gradient_checkpointing == "auto" or self.train.gradient_checkpointing is True):  # 1 is one layer
            raise ValueError(f"{start} that come and go are recomputed, all of them; say train.gradient_checkpointing=auto")
        if self.quant.kept_dense not in ("auto", 0):
            raise ValueError(f"{start} that go take their dense copies with them; say quant.dense_layers=0")
        if self.train.processes > 1:
            raise ValueError(f"{start} come and go in one process; say train.processes=1, or train.offload=none")
        return self

    @model_validator(mode="after")
    def _rows_are_trained(self) -> LanguageStage:
        if self.model.add_tokens and not self.peft.adds_tokens:
            able = ", ".join(name for name, method in METHODS.all().items() if method.adds_tokens)
            raise ValueError(f"model.add_tokens: peft={self.peft.name} trains no rows of the embedding; use one of {able}")
        if self.model.add_tokens and self.train.fsdp:
            raise ValueError("model.add_tokens: train.fsdp does not shard rows of the embedding; say train.fsdp=false")
        return self


class Guarded(LanguageStage):
    """A stage that can forget, and mind it."""

    gives = frozenset({"rows", "quantized"})

    ewc: EwcConfig
    curriculum: CurriculumConfig
    forgetting: ForgettingConfig

    @model_validator(mode="after")
    def _can_be_held(self) -> Guarded:
        if self.ewc.lam and self.train.fsdp:
            raise ValueError("ewc.lambda: its start and Fisher are not sharded; say train.fsdp=false")
        if self.ewc.lam and self.ewc.importance == "fisher" and self.train.offload == "layers":
            raise ValueError("ewc.importance: fisher needs all layers at once; say ewc.importance=l2, or train.offload=none")
        if self.forgetting.budget is not None and "general" not in (self.eval.sets or {}):
            raise ValueError("forgetting.budget: it is of the set eval.sets.general, and there is none")
        if self.forgetting.budget is not None and self.train.save_steps is None:
            raise ValueError("forgetting.budget: it is looked at when a checkpoint is saved; give train.save_steps")
        return self


class Conversational(Guarded):
    """A stage that trains on an assistant's answers, whose parts can count differently."""

    gives = frozenset({"rows", "loss", "quantized"})
    cot: CotConfig
    weights: WeightsConfig

    @model_validator(mode="after")
    def _marked(self) -> Conversational:
        if self.cot.marker is None and self.cot.reasoning_weight != self.cot.answer_weight:
            raise ValueError("cot.marker: give the text that ends the reasoning, such as cot.marker='</think>' or ####")
        return self
