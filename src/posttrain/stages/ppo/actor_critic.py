"""Who plays policy, reference, value and reward: adapters on one base where the runs share it, else models of their own."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from posttrain.console import say
from posttrain.models.counting import count_parameters, record
from posttrain.models.language.actor_critic import VALUE, ActorCritic, add_beside
from posttrain.models.language.loading import load_model, scorer
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.attach import INIT, NEW, put_beside
from posttrain.models.peft.tokens import size_of
from posttrain.runs.artifact import open_artifact
from posttrain.runs.earlier import same_base
from posttrain.stages.language.build import TrainableModel, build_model, reader_of
from posttrain.stages.language.init import InitSource, find_base, merged_start
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.ppo.config import Ppo
from posttrain.training.seeding import seed_step


def build_actor_critic(
    cfg: Ppo, built: TrainableModel, inputs: PreparedData, starts: dict[str, InitSource], device: torch.device
) -> tuple[ActorCritic, TrainableModel]:
    """starts: of the reward model and of the gold one, where there are such. The parameters of all roles are counted in."""
    policy, scorers = built.module, dict[str, PackedScorer]()
    under = [INIT] if INIT in getattr(policy.model, "peft_config", {}) else []
    adapters, reference = _policy_and_reference(cfg, policy, under, inputs, device)
    shared = bool(adapters) and cfg.peft.is_additive and all(_on_this_base(cfg, inputs, start) for start in starts.values())
    for name, start in starts.items():
        if shared:
            put_beside(policy.model, start.adapter, name)  # pyright: ignore
            adapters[name] = [name]
            scorers[name] = _scorer_on(cfg, policy, start, device)
            scorers[name].score.requires_grad_(False)
        else:
            scorers[name] = scorer(load_model(start.place, str(device), scores=True)).requires_grad_(False)
    if cfg.ppo.advantage == "gae":
        start = starts.get("reward")
        seed_step(cfg.train.seed, 0, 1)
        if shared:
            add_beside(policy.model, NEW, VALUE, getattr(torch, cfg.peft.dtype))  # type: ignore[attr-defined]
            adapters["value"] = [*adapters.get("reward", under), VALUE]
            scorers["value"] = _scorer_on(cfg, policy, start, device)
        else:
            scorers["value"] = _critic(cfg, start or inputs.start, inputs, device)
        if not start:
            nn.init.zeros_(scorers["value"].score.weight)
    roles = ActorCritic(policy, reference, scorers, adapters)
    apart = [name for name in ("reference", "value", "reward", "gold") if name in {"reference", *scorers} - adapters.keys()]
    if apart:
        say(f"models of their own in memory beside the policy: {', '.join(apart)}")
    trained, total = count_parameters(roles)
    return roles, replace(built, trained=trained, total=total, counts=record(roles))


def _policy_and_reference(
    cfg: Ppo, policy: PackedLM, under: list[str], inputs: PreparedData, device: torch.device
) -> tuple[dict[str, list[str]], PackedLM | None]:
    """The adapters that are on for each of the two; or none, and a reference that is a model of its own.

    under: the adapter that the policy lies on, if there is one.
    """
    if not cfg.peft.writes_base and inputs.start.mode != "continue":
        return {"policy": [*under, NEW], "reference": under}, None
    if cfg.peft.is_additive and not cfg.peft.writes_base and inputs.start.adapter:
        put_beside(policy.model, inputs.start.adapter, INIT)  # pyright: ignore
        return {"policy": [NEW], "reference": [INIT]}, None
    frozen = build_model(cfg, inputs.start, inputs.base, 1, device, tokens=inputs.new_tokens).module
    return {}, frozen.requires_grad_(False).eval()


def _on_this_base(cfg: Ppo, inputs: PreparedData, start: InitSource) -> bool:
    """Is it an adapter that can take turns with the policy's: a LoRA on the same weights in the same number format, with no rows
    of the embedding of its own?"""
    if (
        not start.adapter
        or start.mode != "stack"
        or not same_base(start.base_digest, inputs.base.digest)
        or size_of(start.adapter)
    ):
        return False
    held = open_artifact(start.place, "init_reward")
    return held.quantization == cfg.quant.model_dump() if held.is_run else not cfg.quant.is_quantized


def _scorer_on(cfg: Ppo, policy: PackedLM, start: InitSource | None, device: torch.device) -> PackedScorer:
    """A head of its own over the policy's model."""
    found = reader_of(cfg, policy.model, device, PackedScorer)
    if start and start.scorer:
        found.load_head(start.scorer)
    return found


def _critic(cfg: Ppo, start: InitSource, inputs: PreparedData, device: torch.device) -> PackedScorer:
    base = find_base(start, None if start.scorer else inputs.base.revision)
    start, base = merged_start(cfg, start, base)
    found = build_model(cfg, start, base, 1, device, True, inputs.new_tokens).module
    assert isinstance(found, PackedScorer)
    return found
