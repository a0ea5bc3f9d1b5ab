"""The config of policy optimisation, and what of it does not go together."""

from __future__ import annotations

from pydantic import model_validator

from posttrain.config.schema import LanguageStage, PpoConfig, RewardConfig, RolloutConfig
from posttrain.errors import UserError


class Ppo(LanguageStage):
    """Config of `posttrain ppo`."""

    init_reward: str | None
    ppo: PpoConfig
    rollout: RolloutConfig
    reward: RewardConfig

    @property
    def example_length(self) -> int:
        """Tokens that a prompt may have, so that an answer fits behind it."""
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
        if self.ppo.dynamic_sampling and self.ppo.advantage == "gae":
            raise ValueError("ppo.dynamic_sampling: gae does not compare answers to one prompt; say ppo.advantage=grpo, or rloo")
        if self.example_length < 1:
            raise ValueError(
                f"rollout.max_new_tokens: {self.rollout.max_new_tokens} leave no room for a prompt within "
                f"train.max_length={self.train.max_length}; raise train.max_length"
            )
        if self.eval.generate.prompts or self.eval.generate.metrics:
            raise ValueError("eval.generate: ppo answers its held-out prompts by itself, and scores them by reward.function")
        if self.train.fsdp:
            raise ValueError("train.fsdp: ppo does not shard its roles; say train.fsdp=false")
        if self.train.processes > 1 and self.rollout.engine == "vllm":
            raise ValueError("train.processes: with vllm ppo runs in one process; say train.processes=1, or rollout.engine=model")
        if self.train.offload == "layers":
            raise ValueError("train.offload: ppo writes token by token, and each would read all layers; say train.offload=none")
        if not self.peft.for_ppo:
            raise ValueError(f"peft: ppo cannot train {self.peft.name}; use +peft=lora, another adapter, or full training")
        if self.train.router_aux_loss not in ("auto", 0):
            raise ValueError("train.router_aux_loss: ppo's loss has none; say train.router_aux_loss=0")
        if self.rollout.engine == "vllm" and (self.quant.is_quantized or not self.peft.for_vllm):
            raise ValueError(
                "rollout.engine: vllm is handed a LoRA over a base in 16 bit; say +peft=lora quant=none, or rollout.engine=model"
            )
        return self


def check_kl(ppo: PpoConfig) -> None:
    """Raises UserError for a penalty that would do something else than one thinks. Not in the schema: runs that earlier versions
    have left so can still be read."""
    if ppo.kl_coef and ppo.kl_in == "reward" and ppo.advantage == "grpo":
        raise UserError(
            "ppo.kl_in: grpo divides by what a group's rewards differ by, and would make whole advantages of a little KL among "
            "them; say ppo.kl_in=loss, or ppo.advantage=rloo"
        )
    if ppo.kl_coef and ppo.kl_in == "loss" and ppo.kl_estimator == "k1":
        raise UserError("ppo.kl_estimator: k1 in the loss has a gradient of mean 0; say ppo.kl_estimator=k3, or k2")
    if ppo.target_kl is not None and not ppo.kl_coef:
        raise UserError("ppo.target_kl: ppo.kl_coef is to follow it, and 0 stays 0; give ppo.kl_coef=0.05, say")
