"""From a config to a model in memory, and from a trained model to the files of a result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from posttrain.config.schema import LanguageStage
from posttrain.data.collate import BatchSampler
from posttrain.data.examples import Examples
from posttrain.data.mixture import Mixture
from posttrain.errors import RunError
from posttrain.evaluation.held_out import EvalSet
from posttrain.models.hub import BaseInfo, digest
from posttrain.models.language.packed_lm import PackedLM, count_numbers, load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.peft.adalora import RankAllocator
from posttrain.models.peft.attach import add_frozen, add_method, continue_adapter, merge_into
from posttrain.models.peft.export import remember_start
from posttrain.models.quantization import quantization
from posttrain.runs.directory import Run, sha256
from posttrain.stages.language.init import InitSource
from posttrain.training.loop import seed_step


@dataclass(frozen=True)
class PreparedData:
    """All that is read before a weight is loaded."""

    start: InitSource
    base: BaseInfo
    tokenizer: Any
    tokenizer_hash: str
    ends: list[int]  # ids of the tokens that end an answer
    data: Mixture
    sets: list[EvalSet]
    order: BatchSampler
    anchor: Examples | None = None  # general text whose Fisher is wanted

    @property
    def key(self) -> str:
        return self.data.key


@dataclass(frozen=True)
class TrainableModel:
    """The model as it will be trained. trained, total: counts of parameters."""

    module: PackedLM
    trained: int
    total: int
    dtype: torch.dtype
    schedule: RankAllocator | None


@dataclass(frozen=True)
class Result:
    """What a run leaves: kind adapter or model, and the digests by which the next stage knows it."""

    kind: str
    base_digest: str
    adapter_digest: str


def build_model(
    cfg: LanguageStage, start: InitSource, base: BaseInfo, num_steps: int, device: torch.device, scores: bool = False
) -> TrainableModel:
    """Load, quantize, put the method on it, over the start's adapter where there is one, and wrap. scores: as a reward model.

    Raises UserError for targets that match nothing, or ranks that do not fit.
    """
    dtype = cfg.base_dtype
    config = quantization(cfg.quant.model_dump(), str(device))
    # FSDP moves a layer at a time to its device, and never holds all of them there
    place = "cpu" if cfg.train.fsdp else str(device)
    model: Any = load_causal(start.source, base.revision, dtype, place, cfg.model.trust_remote_code, config)
    seed_step(cfg.train.seed, 0, 0)  # a new adapter's random half is the run's own
    if start.adapter and start.mode == "continue":
        model = continue_adapter(model, cfg.peft, start.adapter)
    else:
        if start.adapter and start.mode == "merge":
            model = merge_into(model, start.adapter)
        model = add_method(model, cfg.peft, num_steps)
        if cfg.peft.method == "pissa":
            remember_start(model)
        if start.adapter and start.mode == "stack":
            add_frozen(model, start.adapter)
    module = (PackedScorer if scores else PackedLM)(model, attention_of(cfg, device))
    if isinstance(module, PackedScorer) and start.scorer:
        module.load_head(start.scorer)
    schedule = RankAllocator(model) if cfg.peft.method == "adalora" else None
    return TrainableModel(module, *count_numbers(module), getattr(torch, dtype), schedule)


def attention_of(cfg: LanguageStage, device: torch.device) -> str:
    """documents, flex or dense."""
    if cfg.model.attention != "auto":
        return cfg.model.attention
    return "flex" if device.type == "cuda" else "documents"


def save_result(cfg: LanguageStage, run: Run, built: TrainableModel, accelerator: Accelerator, inputs: PreparedData) -> Result:
    """Write adapter/ or model/ with its tokenizer, complete or absent. Every process must call it."""
    kind = cfg.peft.output
    final, temporary = run.dir / kind, run.dir / f".{kind}.tmp"
    is_writer = accelerator.is_main_process
    try:
        if is_writer:
            shutil.rmtree(temporary, ignore_errors=True)
        if kind == "adapter":
            built.module.save_adapter(temporary, inputs.base.path, is_writer)
        else:
            built.module.save(temporary, is_writer)
        if is_writer:
            inputs.tokenizer.save_pretrained(temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    except OSError as e:
        raise RunError(f"{final} could not be written: {e}; the last checkpoint is kept, the same command goes on") from None
    accelerator.wait_for_everyone()
    if kind == "adapter":
        return Result(kind, inputs.base.digest, sha256(final / "adapter_model.safetensors"))
    return Result(kind, digest(final), "")


def frozen_dtype(cfg: LanguageStage) -> str:
    """Of a model that is only read."""
    return "bfloat16" if cfg.model.dtype == "auto" else cfg.model.dtype
