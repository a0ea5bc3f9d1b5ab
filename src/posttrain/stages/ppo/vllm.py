"""PPO's other way of writing answers: a vLLM beside the model under training."""

from __future__ import annotations

from importlib.util import find_spec

import torch

from posttrain.errors import UserError
from posttrain.models.language.vllm_engine import RANKS, Engine
from posttrain.models.peft.export import stacked_rank
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.ppo.config import Ppo


def check_engine() -> None:
    """Raises UserError where vLLM cannot run."""
    if not torch.cuda.is_available():
        raise UserError("rollout.engine: vllm needs CUDA, which is not here; say rollout.engine=model")
    if find_spec("vllm") is None:
        raise UserError("rollout.engine: vllm is not installed; pip install 'posttrain[vllm]', or say rollout.engine=model")


def start_engine(cfg: Ppo, inputs: PreparedData, built: TrainableModel) -> Engine:
    """Raises UserError for adapters of a rank that vLLM has no room for."""
    rank = stacked_rank(built.module.model)
    if rank > RANKS[-1]:
        raise UserError(f"rollout.engine: vllm takes ranks up to {RANKS[-1]}, this policy's adapters have {rank}")
    return Engine(
        inputs.base.path,
        rank=rank,
        max_length=cfg.train.max_length,
        memory_share=cfg.rollout.engine_memory,
        seed=cfg.train.seed,
    )
