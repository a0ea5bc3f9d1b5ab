"""The steps of PPO: a policy with its reference, value and reward models on one base where they can share it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from posttrain.batch import PackedBatch
from posttrain.config.choices import is_reward_function
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.hub import context_length, digest
from posttrain.models.language.actor_critic import ActorCritic
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.peft.tokens import size_of
from posttrain.rewards import RewardFunction, check_options, load_function
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.init import InitSource, resolve_reward
from posttrain.stages.language.prepare import PreparedData, prepare_language, with_parents
from posttrain.stages.language.recompute import fit_memory
from posttrain.stages.language.save import save_language
from posttrain.stages.language.stage import as_given, build_language
from posttrain.stages.language.training import compare_ends, measure_sets, step_callback
from posttrain.stages.ppo.actor_critic import build_actor_critic
from posttrain.stages.ppo.config import Ppo, check_kl
from posttrain.stages.ppo.rollout import Roller, Write, columns_of, texts_of
from posttrain.stages.ppo.summary import lines_of_method
from posttrain.stages.ppo.training import PpoState, PpoTraining
from posttrain.stages.ppo.vllm import check_engine, start_engine
from posttrain.stages.steps import Context, Outcome, Prepared, Session, Trainable, Training


@dataclass(frozen=True, kw_only=True)
class PpoData(PreparedData):
    """functions: rewards by functions; gold: the check that is only reported. starts: of the models that play "reward" and
    "gold"."""

    functions: list[RewardFunction]
    gold: RewardFunction | None
    starts: dict[str, InitSource]


@dataclass(frozen=True)
class PpoModel:
    """policy: what the run leaves, with the counts of all roles. write: what answers for it."""

    policy: TrainableModel
    roles: ActorCritic
    write: Write


def steps(cfg: Ppo) -> PpoSteps:
    """The steps of a run of this config."""
    return PpoSteps()


class PpoSteps:
    """The steps of a run whose policy learns from its own answers."""

    def prepare(self, context: Context) -> Prepared[PpoData]:
        """Everything that can be refused before a weight is loaded: base, data, parents."""
        cfg: Ppo = context.cfg
        check_kl(cfg.ppo)
        language = prepare_language(context)
        base = language.data.base
        most = context_length(base.path, base.revision)
        if most and cfg.train.max_length > most:
            raise UserError(f"train.max_length: {cfg.train.max_length} is more than the model's context of {most} tokens")
        if cfg.rollout.engine == "vllm" and context.weights:
            check_engine()
        start = language.data.start
        if cfg.rollout.engine == "vllm" and (language.data.new_tokens or (start.adapter and size_of(start.adapter))):
            raise UserError("rollout.engine: vllm takes no rows of the embedding beside an adapter; say rollout.engine=model")
        functions, gold = _rewards(cfg, language.data, context.main and context.weights)
        starts = _scorers(cfg, language.data.tokenizer_hash, gold is None)
        language = with_parents(language, [parent for start in starts.values() for parent in start.parents])
        others = {
            f"{name}.weights": start.identity or digest(Path(start.source)) for name, start in starts.items() if not start.parents
        }
        data = PpoData(**vars(language.data), functions=functions, gold=gold, starts=starts)
        lines = [*language.lines[:-1], *lines_of_method(cfg), *language.lines[-1:]]
        return Prepared(data, language.identity | others, language.order, lines, language.where, language.lr)

    def build(self, context: Context, prepared: Prepared[PpoData], accelerator: Accelerator) -> Trainable[PpoModel]:
        """Policy, reference, value and reward, on one base where they can share it."""
        cfg, data = context.cfg, prepared.data
        policy = build_language(context, data, prepared.num_steps, scores=False)
        for line in policy.module.report.lines:
            say(line)
        roles, policy = build_actor_critic(cfg, policy, data, data.starts, context.device)
        write = start_engine(cfg, data, policy).sample if cfg.rollout.engine == "vllm" else sample
        fit_memory(cfg, roles, policy, _largest_batch(cfg), context.device)
        model = PpoModel(policy, roles, write)
        return Trainable(roles, model, policy.trained, policy.total, lambda: as_given(data, policy))

    def training(
        self, context: Context, prepared: Prepared[PpoData], built: Trainable[PpoModel], session: Session
    ) -> Training[PackedBatch]:
        """Rollouts, the updates that each feeds, and what is measured."""
        cfg, data, rollout = context.cfg, prepared.data, context.cfg.rollout
        state = session.state
        state.stage = PpoState(**state.stage) if state.stage else PpoState(cfg.ppo.kl_coef, row_seeds=True)
        for function in data.functions:
            function.load(state.stage.rewards.get(function.name))
        decode = partial(data.tokenizer.decode, skip_special_tokens=True)
        sampling = Sampling(
            rollout.max_new_tokens,
            rollout.temperature,
            rollout.top_p,
            rollout.top_k,
            rollout.batch_size,
            tuple(rollout.stop),
            decode,
        )
        roller = Roller(
            session.module,  # pyright: ignore[reportArgumentType]
            built.model.write,
            sampling,
            data.tokenizer,
            data.ends,
            list(data.starts),  # pyright: ignore[reportArgumentType]
            data.functions,
            data.gold,
            session.accelerator,
        )
        ppo = PpoTraining(context, data, roller, session)
        return Training(
            updates=ppo.updates,
            loss=ppo.loss,
            measure=ppo.measure,
            measure_around=measure_sets(context, data, session),
            compare=compare_ends,
            callback=step_callback(context, data, built.model.policy, session),
        )

    def save(
        self,
        context: Context,
        prepared: Prepared[PpoData],
        built: Trainable[PpoModel],
        outcome: Outcome,
        accelerator: Accelerator,
    ) -> dict[str, Any]:
        """Write the result; returns the stage's part of the manifest."""
        record = save_language(context, prepared.data, built.model.policy, outcome, accelerator, scores=False)
        state: PpoState = outcome.state.stage
        return record | {"alarms": state.alarms, "kl_coef": state.kl_coef}


def _rewards(cfg: Ppo, data: PreparedData, tries: bool) -> tuple[list[RewardFunction], RewardFunction | None]:
    """The functions that give the reward, and the one that checks it; tries: asked for the first rows."""
    reward, options = cfg.reward, cfg.reward.options
    check_options(options, [*reward.function, reward.gold])
    is_function = bool(reward.gold) and is_reward_function(str(reward.gold))
    asked = [(name, "reward.function") for name in reward.function] + [(str(reward.gold), "reward.gold")] * is_function
    found = [load_function(name, field, options, reward.timeout) for name, field in asked]
    columns = {name for part in data.data.parts for name in (*part.stats.unused, *part.train.columns_of(0))}
    examples, first = data.data.train, list(range(min(2, len(data.data.train))))
    answered = bool((np.diff(examples.offsets) > examples.splits[:, 0]).any())
    found = [function.of_rows(columns, answered, field) for function, (_, field) in zip(found, asked, strict=True)]
    for function, (_, field) in zip(found, asked, strict=True):
        if tries:
            prompts, known = texts_of(examples, first, data.tokenizer)
            function.try_out(prompts, known, known, columns_of(examples, first), field)
    return found[: len(reward.function)], found[-1] if is_function else None


def _scorers(cfg: Ppo, tokenizer_hash: str, gold: bool) -> dict[str, InitSource]:
    """Where the reward model, and a gold one, begin. gold: whether `reward.gold` names a run and no function."""
    found = {}
    if cfg.init_reward:
        found["reward"] = resolve_reward(cfg, cfg.init_reward, "init_reward", tokenizer_hash, cfg.ppo.advantage == "gae")
    if cfg.reward.gold and gold:
        found["gold"] = resolve_reward(cfg, cfg.reward.gold, "reward.gold", tokenizer_hash)
    return found


def _largest_batch(cfg: Ppo) -> int:
    """Tokens that a micro-batch has at most: prompts, each with all its answers at their longest."""
    return cfg.train.batch_size * (cfg.train.max_length + (cfg.ppo.samples - 1) * cfg.rollout.max_new_tokens)
