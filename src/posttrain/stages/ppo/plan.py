"""What a plan must know of PPO alone: its other roles, by the rule of actor_critic.py, and the key-value cache."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from posttrain.config.choices import is_reward_function
from posttrain.data.examples import Examples
from posttrain.models.language.actor_critic import VALUE, ActorCritic, add_beside
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.attach import NEW
from posttrain.models.peft.kinds import is_plain_sum
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.stages.language.plan import Extra
from posttrain.stages.ppo.config import Ppo
from posttrain.tensors import numbers_in

BASE = ("weights", "quantized weights", "quantization constants")
TRAINED = ("adapters", "gradients", "optimizer")


def unit_tokens(cfg: Ppo, examples: Examples) -> NDArray[np.int64]:
    """The prompt, and its answers at their longest."""
    return examples.splits[:, 0] + cfg.ppo.samples * cfg.rollout.max_new_tokens


def extra(cfg: Ppo, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """Memory of the roles and of the cache; an epoch is a pass, and with gae the value model takes as many."""
    roles, shared = role_bytes(cfg, parts, base)
    cache = cache_bytes(cfg, model, 4 if cfg.base_dtype == "float32" else 2)
    which = "policy, reference, value and reward share one base" if shared else "not all roles can share the policy's base"
    note = f"{which}; time is of the updates, the answers' writing comes on top"
    passes = cfg.ppo.epochs * (2 if cfg.ppo.advantage == "gae" else 1)
    trained, total = role_numbers(cfg, parts, model, shared)
    notes = [note] if shared else [note, "of the frozen models beside the policy the parameters are not counted"]
    return Extra({"key-value cache": cache, **roles}, passes, notes, trained, total)


def trained_module(cfg: Ppo, lm: PackedLM) -> nn.Module:
    """With the value model, on the policy's base or as large as it."""
    scorers = dict[str, PackedScorer]()
    if cfg.ppo.advantage == "gae":
        if cfg.peft.is_additive:
            add_beside(lm.model, NEW, VALUE, getattr(torch, cfg.peft.dtype))  # type: ignore[attr-defined]
        scorers["value"] = PackedScorer(lm.model, cfg.model.attention, "reference", cfg.train.packing)
    return ActorCritic(lm, None, scorers, {})


def role_numbers(cfg: Ppo, parts: dict[str, float], config: Any, shared: bool) -> tuple[int, int]:
    """Parameters of the roles beside the policy, trained ones and all: the value model's adapter, or all that is trained of it,
    with its head; and the adapters and heads of rewards that share the base."""
    hidden, dtype = config.get_text_config().hidden_size, getattr(cfg.peft, "dtype", cfg.base_dtype)
    trained = (
        round(parts["gradients"] / (2 if dtype in ("bfloat16", "float16") else 4)) + hidden if cfg.ppo.advantage == "gae" else 0
    )
    named = ((cfg.init_reward, "init_reward"), (_run(cfg.reward.gold), "reward.gold"))
    rewards = sum(numbers_in(open_artifact(run, field).weights) for run, field in named if run) if shared else 0
    return trained, trained + rewards


def role_bytes(cfg: Ppo, parts: dict[str, float], base: str) -> tuple[dict[str, float], bool]:
    """Bytes by role beside the policy, and whether all roles share one base. parts: the policy's own; base: where its base is."""
    named = (("reward", cfg.init_reward, "init_reward"), ("gold", _run(cfg.reward.gold), "reward.gold"))
    rewards = {name: open_artifact(run, field) for name, run, field in named if run}
    in_place = not cfg.peft.writes_base
    shared = in_place and cfg.peft.is_additive and all(_shares(cfg, run, base) for run in rewards.values())
    whole = sum(parts.get(part, 0.0) for part in BASE)
    trained = sum(parts.get(part, 0.0) for part in TRAINED)
    found = {} if in_place else {"reference model": whole}
    for name, run in rewards.items():
        run.finished()
        own = run.weight_bytes
        found[f"{name} adapter" if shared else f"{name} model"] = own if shared or run.kind == "model" else whole + own
    if cfg.ppo.advantage == "gae":
        # in full training its weights are among what is trained; their gradients and moments come on top
        found["value adapter, gradients, optimizer" if shared else "value model"] = trained if shared else whole + trained
    return found, shared


def cache_bytes(cfg: Ppo, config: Any, itemsize: int) -> float:
    """Keys and values of the answers that grow together, at their longest."""
    text = config.get_text_config()
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return 2.0 * text.num_hidden_layers * heads * width * cfg.train.max_length * cfg.rollout.batch_size * itemsize


def _run(name: str | None) -> str | None:
    return None if name and is_reward_function(name) else name


def _shares(cfg: Ppo, run: Artifact, base: str) -> bool:
    if run.kind != "adapter" or run.quantization != cfg.quant.model_dump():
        return False
    return is_plain_sum(run.adapter.whole) and run.source == base
