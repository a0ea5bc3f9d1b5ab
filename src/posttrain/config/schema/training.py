"""What every run has: optimizer, steps, evaluation, its directory."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, StrictBool, model_validator

from posttrain.config.choices import OPTIMIZERS, RATE_GROUPS, Schedule
from posttrain.config.fields import NonNegative, OneOf, Positive, Rate, Share, Strict, Weight, listed
from posttrain.config.interfaces import Method
from posttrain.config.metrics import METRICS, direction
from posttrain.config.schema.launch import Launcher
from posttrain.errors import did_you_mean
from posttrain.runs.remote import is_address

LEAST_FACTOR = 0.01  # of an optimizer that finds its rate: below it `optim.lr` was meant as a rate


class OptimConfig(Strict):
    """`optim`: the optimizer and the schedule of its learning rate."""

    name: Annotated[str, OneOf(OPTIMIZERS)]
    lr: Rate | Literal["auto"]
    lr_factor: Rate
    lr_groups: dict[str, Rate] | None
    betas: tuple[Share, Share] | None
    eps: Rate | None
    weight_decay: Annotated[float, Field(ge=0)]
    schedule: Schedule
    warmup_ratio: Share
    warmup_steps: NonNegative | None
    min_lr: Weight
    decay_ratio: Share
    max_grad_norm: Rate | None
    options: dict[str, float | bool] | None

    @model_validator(mode="after")
    def _has_what_it_takes(self) -> OptimConfig:
        kind = OPTIMIZERS.get(self.name)
        for key in ("betas", "eps"):
            if (getattr(self, key) is not None) != (key in kind.takes):
                other = "give it" if key in kind.takes else "say null"
                raise ValueError(f"optim.{key}: {self.name} {'needs it' if key in kind.takes else 'has none'}; {other}")
        for key, value in (self.options or {}).items():
            if key not in kind.options:
                known = f"it has {', '.join(kind.options)}" if kind.options else "it has none"
                raise ValueError(f"optim.options.{key}: no option of {self.name}{did_you_mean(key, list(kind.options))}; {known}")
            if (kind.options[key] is bool) != isinstance(value, bool):
                raise ValueError(f"optim.options.{key}: {value} should be a {kind.options[key].__name__}")
        if kind.averages and self.betas and not self.betas[0]:
            raise ValueError(f"optim.betas: the first is how {self.name} averages, and must be above 0")
        return self

    @model_validator(mode="after")
    def _rate_goes_with_it(self) -> OptimConfig:
        kind = OPTIMIZERS.get(self.name)
        if kind.schedules and self.schedule not in kind.schedules:
            raise ValueError(f"optim.schedule: {self.name} takes the place of a schedule; say optim.schedule={kind.schedules[0]}")
        if kind.finds_rate and (self.lr == "auto" or self.lr < LEAST_FACTOR):
            raise ValueError(f"optim.lr: {self.name} finds the rate, and optim.lr multiplies it; say optim.lr=1")
        if kind.one_rate and self.lr_groups:
            raise ValueError(f"optim.lr_groups: {self.name} has one rate for all; leave them out, or say optim=adamw")
        if self.min_lr and self.schedule == "constant":
            raise ValueError("optim.min_lr: a constant schedule does not fall; say optim.schedule=cosine, linear or wsd")
        if self.lr != "auto" and self.min_lr > self.lr:
            raise ValueError(f"optim.min_lr: {self.min_lr:g} is above optim.lr={self.lr:g}")
        for key in self.lr_groups or {}:
            _check_group(key)
        return self

    def check(self, peft: Method, fsdp: bool) -> None:
        """Raises ValueError where it does not go with a method, or with sharding."""
        kind = OPTIMIZERS.get(self.name)
        if kind.whole_matrices and peft.output == "adapter":
            raise ValueError(
                f"optim.name: {self.name} turns the update of a whole weight matrix, which peft={peft.name} does not train; "
                f"use peft=none, or optim=adamw"
            )
        if kind.one_rate and peft.several_rates:
            raise ValueError(f"optim.name: {self.name} has one rate, and peft={peft.name} two; use peft=lora, or optim=adamw")
        if fsdp and not kind.shards:
            raise ValueError(f"optim.name: {self.name} does not shard; say train.fsdp=false, or optim=adamw")


def _check_group(key: str) -> None:
    if key not in RATE_GROUPS and key.isalpha() and (near := did_you_mean(key, list(RATE_GROUPS))):
        raise ValueError(f"optim.lr_groups.{key}: no such group{near}")
    try:
        re.compile(key)
    except re.error as error:
        raise ValueError(f"optim.lr_groups: '{key}' is no regular expression ({error})") from error


class EarlyStopping(Strict):
    """`train.early_stopping`: a run ends where evaluations get no better."""

    patience: Positive | None  # evaluations that are not better than the best; None: the run goes on
    metric: str | None
    direction: Literal["auto", "lower", "higher"]


class TrainConfig(Strict):
    """`train`: steps, batches, checkpoints, memory and processes."""

    max_steps: Positive | None  # optimizer steps; wins over epochs
    epochs: Rate
    batch_size: Positive  # sequences (pairs, packs) a micro-batch, per process
    grad_accum: Positive
    seed: NonNegative
    log_steps: Positive
    eval_steps: Positive | None
    save_steps: Positive | None
    keep_checkpoints: Positive
    keep_best: str | None  # a metric of the evaluations; the result is then the best checkpoint
    early_stopping: EarlyStopping
    skip_nonfinite: NonNegative
    spike_mads: Rate | None
    spike_steps: Annotated[int, Field(ge=8)]
    gradient_checkpointing: Literal["auto"] | StrictBool | Positive  # auto: as many layers as memory asks for
    precision: Literal["auto", "none", "bf16"]  # autocast; auto: bf16 on CUDA when weights are float32
    processes: Positive  # of all machines together
    launcher: Launcher
    fsdp: bool

    @property
    def judged_by(self) -> str | None:
        """The metric that evaluations are compared by; None where they are not."""
        stopping = self.early_stopping
        return self.keep_best or (stopping.metric or "eval/loss" if stopping.patience else None)

    @model_validator(mode="after")
    def _judged(self) -> TrainConfig:
        stopping, metric = self.early_stopping, self.judged_by
        if metric is None:
            if stopping.metric or stopping.direction != "auto":
                raise ValueError("train.early_stopping: give its patience too, in evaluations, or train.keep_best")
            return self
        key = "train.keep_best" if self.keep_best else "train.early_stopping.patience"
        if self.eval_steps is None:
            raise ValueError(f"{key}: evaluations are compared, and there is none during training; give train.eval_steps")
        if self.keep_best and stopping.metric not in (None, self.keep_best):
            raise ValueError(
                f"train.early_stopping.metric: one metric decides, and train.keep_best is {self.keep_best}; leave one of them out"
            )
        if stopping.direction == "auto" and not direction(metric):
            near = did_you_mean(metric, [f"eval/{name}" for name in METRICS])
            raise ValueError(
                f"{key}: nothing says whether more or less of {metric} is better{near} "
                "(train.early_stopping.direction=lower or higher does)"
            )
        return self


class LanguageTrain(TrainConfig):
    """`train` of language models."""

    packing: Literal["auto"] | StrictBool  # documents of a micro-batch in one row; auto: where the model can keep them apart
    router_aux_loss: Literal["auto"] | Weight  # times the routers' balance; auto: what the model's own config adds to its loss
    base_dropout: bool  # as the base's own config has it; no adapter's
    max_length: Annotated[int, Field(ge=8)]
    offload: Literal["none", "activations", "layers"]  # what leaves the device's memory while it is not computed with


class GenerateConfig(Strict):
    """`eval.generate`: answers to held-out prompts at every evaluation."""

    prompts: NonNegative
    max_new_tokens: Positive
    temperature: Annotated[float, Field(ge=0)]
    metrics: Annotated[list[str], BeforeValidator(listed)]  # rewards by name, or module:name
    options: dict[str, dict[str, Any] | None] | None  # of built-in ones, by their names


class HarnessConfig(Strict):
    """`eval.harness`: how `eval.tasks` are asked."""

    every: Positive | None  # evaluations; None: before and after the run alone
    shots: NonNegative | None  # None: each task's own number
    limit: Positive | None
    batch_size: Positive
    chat_template: Literal["auto"] | StrictBool
    include: str | None


class EvalConfig(Strict):
    """`eval` of language models: sets that are measured before and after a stage."""

    sets: dict[str, str] | None  # name -> path; each is measured before and after the stage
    rows: Positive
    max_length: Annotated[int, Field(ge=8)]
    generate: GenerateConfig
    tasks: Annotated[list[str], BeforeValidator(listed)]  # of lm-eval, by their names
    harness: HarnessConfig


class RunConfig(Strict):
    """`run`: the run's directory, and how a run ends early or rebuilds another."""

    dir: str | None
    mirror: str | None  # an address that has a copy of it, to go on from on another machine
    stop_after: Positive | None  # steps of one start
    reproduces: str | None
    warm: bool

    @model_validator(mode="after")
    def _trains_on_this_disk(self) -> RunConfig:
        if self.dir and is_address(self.dir):
            raise ValueError(
                f"run.dir: a run writes on this machine; give a directory, and run.mirror={self.dir} for a copy there"
            )
        if self.mirror and not is_address(self.mirror):
            raise ValueError(f"run.mirror: '{self.mirror}' is no address; write s3://BUCKET/DIRECTORY, gs://... or hf://...")
        return self


class TrackConfig(Strict):
    """`track`: what the tracker's run is called, and what the tracker is given."""

    project: Annotated[str, Field(min_length=1)]
    name: str | None
    tags: Annotated[list[str], BeforeValidator(listed)]
    group: str | None
    id: str | None
    artifacts: bool


class ResumeConfig(Strict):
    """`resume`: what may change between two starts of a run."""

    allow: Annotated[list[str], BeforeValidator(listed)]  # keys that may change between two starts of a run
