"""The composed config as frozen, typed objects. No defaults here: every default is in a YAML under configs/."""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool, TypeAdapter, model_validator

from posttrain.config.paths import root


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, str) else value or []


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


class LanguageModel(ModelConfig):
    attention: Literal["auto", "documents", "flex", "dense"]  # auto: flex on CUDA, documents elsewhere
    chat_template: str | None  # a file, or chatml; None: the tokenizer's own
    trust_remote_code: bool

    @model_validator(mode="after")
    def _code_is_pinned(self) -> LanguageModel:
        pinned = re.fullmatch(r"[0-9a-f]{40}", self.revision or "") or Path(self.name).expanduser().is_dir()
        if self.trust_remote_code and not pinned:
            raise ValueError("model.trust_remote_code: code from the hub needs model.revision=, a commit of 40 hex digits")
        return self


class Method(Strict):
    """What is trained. saves: weights of the model itself, or an adapter in peft's format. is_sum: the change of a layer is a
    sum B A, so it can lie on top of another one, and both are one of summed rank."""

    saves: ClassVar[Literal["model", "adapter"]] = "adapter"
    is_sum: ClassVar[bool] = False
    lr_factor: Rate


class Full(Method):
    saves = "model"
    method: Literal["none"]


class Head(Method):
    saves = "model"
    method: Literal["head"]


class Partial(Method):
    saves = "model"
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
    is_sum = True
    method: Literal["lora", "qlora", "rslora", "pissa"]
    alpha: Rate


class LoraPlus(Targeted):
    is_sum = True
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


class Int8(Strict):
    method: Literal["int8"]
    threshold: Annotated[float, Field(ge=0)]  # inputs with a larger magnitude are multiplied in 16 bit


QuantConfig = Annotated[NoQuant | Nf4 | Int8, Field(discriminator="method")]


class ChainConfig(Strict):
    mode: Literal["auto", "stack", "merge", "continue"]


@lru_cache
def _unsaid() -> dict[str, Any]:
    """What a source leaves unsaid is as configs/data/file.yaml has it."""
    return yaml.safe_load((root("configs") / "data" / "file.yaml").read_text())


class Source(Strict):
    """Where rows come from, and which of them are taken."""

    path: str  # a file, a hub id, builtin:reference|questions|preferences|general, or self: the base model writes
    shape: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "text", "pairs"]
    subset: str | None  # configuration of a hub data set
    split: str
    revision: str | None
    columns: dict[str, str] | None  # a name that a shape knows -> the data's own
    quality: Literal["filter", "weight"] | None  # what the column of that name is for
    quality_top: Annotated[float, Field(gt=0, le=1)]  # share of the rows that a filter keeps, the best
    skip_rows: NonNegative  # of those to train on, before max_rows are taken
    max_rows: Positive | None

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        return {**{k: v for k, v in _unsaid().items() if k in cls.model_fields and k != "path"}, **given}


class MixedSource(Source):
    share: Annotated[float, Field(gt=0, le=1)]  # of the run's tokens


class ReplayConfig(Strict):
    """How the base model writes a general corpus of its own."""

    tokens: Positive
    max_new_tokens: Positive
    temperature: Rate
    batch_size: Positive


class DataConfig(Source):
    path: str | None  # pyright: ignore[reportIncompatibleVariableOverride]  # None: with sources
    alpha: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None  # share of tokens from `path`; general has the others
    general: Source
    sources: dict[str, MixedSource] | None  # in place of path, alpha and general
    exhausted: Literal["repeat", "stop"]  # a source whose rows have all been drawn
    replay: ReplayConfig
    eval_path: str | None  # None: a share of the rows, chosen by a hash of each row's content
    eval_share: Annotated[float, Field(ge=0, lt=1)]
    eval_rows: NonNegative  # at most so many held-out rows
    on_error: Literal["stop", "skip"]  # a row with a mistake in it; skipped ones are counted
    max_untrained_share: Share  # more rows without a trained token than this share is an error

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> DataConfig:
        if self.sources is None and self.path is None:
            raise ValueError("data.path has no value; give data.path=..., or data=mix with data.sources.NAME.path=...")
        if self.sources is None:
            return self
        if self.alpha is not None:
            raise ValueError("data.alpha: every one of data.sources has a share of its own; leave alpha out")
        if not self.sources:
            raise ValueError("data.sources: there is none; give data.sources.NAME.path=... and data.sources.NAME.share=...")
        total = sum(source.share for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"data.sources: the shares sum to {total:g}; they are shares of all tokens, so make them 1")
        return self


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
    seed: NonNegative
    log_steps: Positive
    eval_steps: Positive | None
    save_steps: Positive | None
    keep_checkpoints: Positive
    skip_nonfinite: NonNegative
    spike_mads: Rate | None
    spike_steps: Annotated[int, Field(ge=8)]
    gradient_checkpointing: Literal["auto"] | StrictBool | Positive  # auto: as many layers as memory asks for
    precision: Literal["auto", "none", "bf16"]  # autocast; auto: bf16 on CUDA when weights are float32
    processes: Positive
    fsdp: bool


class LanguageTrain(TrainConfig):
    max_length: Annotated[int, Field(ge=8)]


class EvalConfig(Strict):
    sets: dict[str, str] | None  # name -> path; each is measured before and after the stage
    rows: Positive
    max_length: Annotated[int, Field(ge=8)]


class RunConfig(Strict):
    dir: str | None
    stop_after: Positive | None  # steps of one start
    reproduces: str | None


class ResumeConfig(Strict):
    allow: Annotated[list[str], BeforeValidator(_listed)]  # keys that may change between two starts of a run


class DpoConfig(Strict):
    beta: Rate
    loss: Literal["sigmoid", "ipo", "sigmoid_norm"]
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)]


Weight = Annotated[float, Field(ge=0)]


class EwcConfig(Strict):
    lam: Weight = Field(alias="lambda")  # of the pull to the start; 0: none
    importance: Literal["fisher", "l2"]  # how much each weight mattered, or all alike
    path: str  # general text, or self: text that the base model writes
    rows: Positive
    max_length: Annotated[int, Field(ge=8)]


class CurriculumConfig(Strict):
    by: Literal["length", "perplexity"] | None
    beta_start: float
    beta_end: float


def _percent(value: Any) -> Any:
    return value.removesuffix("%").strip() if isinstance(value, str) else value


class ForgettingConfig(Strict):
    budget: Annotated[float | None, BeforeValidator(_percent)]  # percent of the general loss, as 5 or 5%
    action: Literal["warn", "stop"]
    weight: Weight  # of forgetting, in nats, beside the domain's loss, when a sweep over data.alpha chooses


class CotConfig(Strict):
    marker: str | None  # ends the reasoning of an answer: </think>, ####
    reasoning_weight: Weight
    answer_weight: Weight


class WeightsConfig(Strict):
    """Of an answer's tokens in the loss."""

    tool_calls: Weight
    earlier_turns: Weight  # of the assistant's turns but the last
    gamma: Weight  # an answer of n tokens counts exp(-gamma max(0, n - l_max)) of itself
    l_max: Positive


class RmConfig(Strict):
    centering: Annotated[float, Field(ge=0)]  # weight of (r_chosen + r_rejected)^2, which keeps scores around zero
    policy: str | None  # a run whose own answers make the pairs
    rule: str | None  # module:name, which ranks them
    samples: Annotated[int, Field(ge=2)]
    max_new_tokens: Positive

    @model_validator(mode="after")
    def _together(self) -> RmConfig:
        if (self.policy is None) != (self.rule is None):
            raise ValueError(
                "rm.policy and rm.rule go together: answers of a run, and module:name of the function that ranks them"
            )
        return self


class PpoConfig(Strict):
    advantage: Literal["gae", "grpo", "rloo"]
    samples: Positive  # answers to a prompt
    gamma: Share
    lam: Share
    kl_coef: Annotated[float, Field(ge=0)]  # of the KL to the stage's start, taken off the reward
    kl_estimator: Literal["k1", "k2", "k3"]
    target_kl: Rate | None  # nats an answer; kl_coef then follows it
    kl_rate: Annotated[float, Field(gt=0, lt=1)]
    clip: Rate
    value_clip: Rate | None
    value_coef: Annotated[float, Field(ge=0)]
    entropy_coef: Annotated[float, Field(ge=0)]
    whiten: bool
    epochs: Positive
    minibatches: Positive
    stop_kl: Rate | None  # nats a token between the policy that sampled and the one under training


class RolloutConfig(Strict):
    max_new_tokens: Positive
    temperature: Rate
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegative
    batch_size: Positive
    engine: Literal["model", "vllm"]
    engine_memory: Annotated[float, Field(gt=0, lt=1)]  # vLLM's share of the device


class RewardConfig(Strict):
    function: Annotated[list[str], BeforeValidator(_listed)]  # module:name
    weights: list[float] | None
    clip: Rate | None
    whiten: bool
    missing_end: Annotated[float, Field(ge=0)]
    gold: str | None  # a reward model's run, or module:name


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
        if self.quant.method != "none" and (self.peft.saves == "model" or self.peft.method == "pissa"):
            how = {"none": "in full", "pissa": "by pissa, which writes into the base"}.get(
                self.peft.method, f"by {self.peft.method}"
            )
            raise ValueError(f"quant={self.quant.method} cannot be trained {how}; add +peft=qlora, or say quant=none")
        if self.quant.method == "int8" and self.peft.method == "dora":
            raise ValueError("quant=int8 cannot be trained by dora, which has to read the whole weight; say quant=nf4")
        if self.quant.method != "none" and self.train.fsdp:
            raise ValueError(f"train.fsdp does not shard a base in {self.quant.method}; say quant=none, or train.fsdp=false")
        if self.train.fsdp and not (self.peft.saves == "model" or self.peft.is_sum):
            raise ValueError(f"train.fsdp does not shard peft={self.peft.method}; use peft=lora, or train.fsdp=false")
        return self


class LanguageStage(Stage):
    model: LanguageModel  # pyright: ignore[reportIncompatibleVariableOverride]
    train: LanguageTrain  # pyright: ignore[reportIncompatibleVariableOverride]
    chain: ChainConfig
    data: DataConfig
    eval: EvalConfig

    @model_validator(mode="after")
    def _rows_can_weigh(self) -> LanguageStage:
        sources = {"data": self.data, **{f"data.sources.{name}": each for name, each in (self.data.sources or {}).items()}}
        for key, source in sources.items():
            if source.quality == "weight" and not isinstance(self, Cpt | Sft):
                raise ValueError(
                    f"{key}.quality: weights are of tokens to imitate, which cpt and sft have; say {key}.quality=filter"
                )
        return self

    @property
    def example_length(self) -> int:
        """Tokens that a row of data may have."""
        return self.train.max_length


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
            self.peft.is_sum and self.peft.method != "pissa" and self.quant.method == "none"
        ):
            raise ValueError(
                "rollout.engine: vllm is handed a LoRA over a base in 16 bit; say +peft=lora quant=none, or rollout.engine=model"
            )
        return self


class ImageData(Strict):
    instance_dir: str | None
    instance_prompt: str | None
    class_prompt: str | None
    class_dir: str | None
    token: str | None
    captions: Literal["prompt", "files", "metadata"]
    size: Annotated[int, Field(ge=8)] | None
    buckets: bool
    crops: Positive
    flip: bool
    background: str
    mask: str | None  # alpha, or a directory
    corrupt: Literal["stop", "skip"]
    cache: bool


class PriorConfig(Strict):
    weight: Annotated[float, Field(ge=0)]
    images: Positive
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DreamboothConfig(Strict):
    text_encoder: bool
    levels: Literal["auto", "uniform", "logit_normal"]
    min_snr: Rate | None
    noise_offset: Annotated[float, Field(ge=0)]


class SampleConfig(Strict):
    images: NonNegative
    prompts: Annotated[list[str], BeforeValidator(_listed)]
    unrelated: Annotated[list[str], BeforeValidator(_listed)]
    inference_steps: Positive
    guidance: Annotated[float, Field(ge=0)] | None
    batch_size: Positive


class DriftConfig(Strict):
    images: NonNegative
    levels: Positive
    clip: str | None
    dino: str | None


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
        if self.train.fsdp:
            raise ValueError("train.fsdp shards language models; say train.fsdp=false")
        return self


StageConfig = Annotated[Cpt | Sft | Rm | Dpo | Ppo | Dreambooth, Field(discriminator="stage")]
STAGE_CONFIG: TypeAdapter[Any] = TypeAdapter(StageConfig)
