"""Policy optimisation on sampled answers: PPO (Schulman et al. 2017, arXiv 1707.06347; Ouyang et al. 2022, arXiv 2203.02155),
and with other advantages GRPO and RLOO. A step of the run is one rollout and the updates that it feeds."""

from __future__ import annotations

from posttrain.data.row_use import RowUse
from posttrain.stages.spec import INIT, OF_ALL, OF_LANGUAGE, Parent, StageSpec

SPEC = StageSpec(
    name="ppo",
    position=4,
    about="Policy optimisation (PPO, GRPO, RLOO) against a reward.",
    examples=(
        "+peft=qlora init=runs/sft/RUN init_reward=runs/rm/RUN",
        "+peft=lora init=runs/sft/RUN reward.function=length +reward.options.length.at_most=50 ppo.advantage=grpo ppo.samples=4",
    ),
    settings=(
        *OF_LANGUAGE,
        ("init_reward=RUN", "the reward: a finished rm run, or reward.function=length (exact, code, ..., module:name)"),
        ("ppo.advantage=gae", "or grpo, rloo, with ppo.samples; ppo.loss, ppo.kl_coef, ppo.clip"),
        ("rollout.temperature=1", "rollout.max_new_tokens, rollout.engine"),
        *OF_ALL,
    ),
    config="posttrain.stages.ppo.config:Ppo",
    steps="posttrain.stages.ppo.stage:steps",
    rows=RowUse(
        "ppo",
        takes=("prompts", "messages", "prompt_completion", "pairs"),
        examples="prompts",
        needs="prompts: prompt alone, messages, instruction and output, prompt and completion, or prompt, chosen and rejected",
    ),
    parents=(INIT, Parent("init_reward", "reward"), Parent("reward.gold", "gold")),
    plan="posttrain.stages.ppo.plan",
    figures=(
        *("reward", "reward_*", "reward_std", "reward_per_token", "gold", "gold_std", "unscored"),
        *("kl", "entropy", "length", "ended", "length_correlation"),
    ),
)
