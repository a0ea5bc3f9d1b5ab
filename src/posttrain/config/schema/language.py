"""Sections of the language stages."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from posttrain.config.choices import (
    POLICY_LOSSES,
    PREFERENCE_LOSSES,
    TOKEN_LOSSES,
    Advantage,
    AdvantageScale,
    Correction,
    KlEstimator,
    KlPlace,
)
from posttrain.config.fields import NonNegative, OneOf, Positive, Rate, Share, Strict, SumOf, Weight, listed


class SftConfig(Strict):
    """`sft`: the loss that is trained by; held-out figures are of the plain one."""

    loss: Annotated[str, OneOf(TOKEN_LOSSES)]
    label_smoothing: Annotated[float, Field(ge=0, lt=1)]
    z_loss: Weight
    neftune_noise_alpha: Rate | None

    @property
    def spread(self) -> bool:
        """Does it ask for more of a prediction than its log-prob?"""
        return bool(self.label_smoothing or self.z_loss)

    @property
    def is_plain(self) -> bool:
        """Is it the loss that is measured?"""
        return self.loss == "nll" and not self.spread and self.neftune_noise_alpha is None


class DpoConfig(Strict):
    """`dpo`: the preference loss and its settings."""

    beta: Rate | None  # None: the usual one of the loss
    loss: Annotated[str | dict[str, float], SumOf(PREFERENCE_LOSSES)]  # a name, or several with their weights
    label_smoothing: Annotated[float | None, Field(ge=0, lt=0.5)]  # None: the usual one of the loss
    options: dict[str, float | bool | str] | None  # of the chosen loss alone


class EwcConfig(Strict):
    """`ewc`: a pull to the weights at the start (Kirkpatrick et al. 2017)."""

    lam: Weight = Field(alias="lambda")  # of the pull to the start; 0: none
    importance: Literal["fisher", "l2"]  # how much each weight mattered, or all alike
    path: str  # general text, or self: text that the base model writes
    rows: Positive
    max_length: Annotated[int, Field(ge=8)]


class CurriculumConfig(Strict):
    """`curriculum`: easy rows first (Bengio et al. 2009)."""

    by: Literal["length", "perplexity"] | None
    beta_start: float
    beta_end: float
    every_row: bool


def _percent(value: Any) -> Any:
    return value.removesuffix("%").strip() if isinstance(value, str) else value


class ForgettingConfig(Strict):
    """`forgetting`: how much the loss on general text may rise."""

    budget: Annotated[float | None, BeforeValidator(_percent)]  # percent of the general loss, as 5 or 5%
    action: Literal["warn", "stop"]
    weight: Weight  # of forgetting, in nats, beside the domain's loss, when a sweep over data.alpha chooses


class CotConfig(Strict):
    """`cot`: answers of reasoning, a marker and the final answer."""

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
    """`rm`: the reward model's loss, and pairs from a policy's own answers."""

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
    """`ppo`: advantages, KL, clipping and updates of policy optimisation."""

    advantage: Advantage
    loss: Annotated[str, OneOf(POLICY_LOSSES)]
    samples: Positive  # answers to a prompt
    dynamic_sampling: bool
    max_draws: Positive
    scale: AdvantageScale
    gamma: Share
    lam: Share
    kl_coef: Annotated[float, Field(ge=0)]  # of the KL to the stage's start
    kl_in: KlPlace
    kl_estimator: KlEstimator
    target_kl: Rate | None  # nats an answer; kl_coef then follows it
    kl_rate: Annotated[float, Field(gt=0, lt=1)]
    clip: Rate
    clip_high: Rate
    mask_truncated: bool
    value_clip: Rate | None
    value_coef: Annotated[float, Field(ge=0)]
    entropy_coef: Annotated[float, Field(ge=0)]
    whiten: bool
    epochs: Positive
    minibatches: Positive
    stop_kl: Rate | None  # nats a token between the policy that sampled and the one under training


class RolloutConfig(Strict):
    """`rollout`: how answers are sampled."""

    max_new_tokens: Positive
    temperature: Rate
    top_p: Annotated[float, Field(gt=0, le=1)]
    top_k: NonNegative
    stop: Annotated[list[Annotated[str, Field(min_length=1)]], BeforeValidator(listed)]
    batch_size: Positive
    engine: Literal["model", "vllm"]
    engine_memory: Annotated[float, Field(gt=0, lt=1)]  # vLLM's share of the device
    correction: Correction
    correction_cap: Annotated[float, Field(gt=1)]


class RewardConfig(Strict):
    """`reward`: your own functions, their weights, and how rewards are shaped."""

    function: Annotated[list[str], BeforeValidator(listed)]  # built in, or module:name
    options: dict[str, dict[str, Any] | None] | None  # of built-in rewards, by their names
    timeout: Rate  # seconds that a function may take
    weights: list[float] | None
    clip: Rate | None
    whiten: bool | Literal["each"]
    overlong: tuple[NonNegative, Positive] | None  # tokens from which an answer is too long, and that take off 1
    missing_eos_penalty: Annotated[float, Field(ge=0)]
    gold: str | None  # a reward model's run, or a function as above

    @model_validator(mode="after")
    def _grows(self) -> RewardConfig:
        if self.overlong and self.overlong[0] >= self.overlong[1]:
            raise ValueError(
                "reward.overlong: give fewer tokens first, from which the penalty grows, as in reward.overlong=[400,512]"
            )
        return self
