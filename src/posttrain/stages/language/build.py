"""2. From a config to a model in memory, with what is trained of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from posttrain.config.schema import LanguageStage
from posttrain.devices.device import Device
from posttrain.models.counting import count_parameters, record
from posttrain.models.hub import BaseInfo, digest, resolve
from posttrain.models.language.dropout import switch_off_dropout
from posttrain.models.language.new_tokens import NewToken, give_rows
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal, without_values
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.offload.store import FORM, Streamed, layer_names, put_layers, stored_layers
from posttrain.models.offload.stream import LayerStream
from posttrain.models.peft.attach import add_frozen, add_method, merge_into
from posttrain.models.peft.tokens import inherit
from posttrain.models.trust import pin_of
from posttrain.runs.cache_place import cache_root
from posttrain.runs.identity import content_hash, library_versions
from posttrain.stages.language.init import InitSource
from posttrain.stages.precision import autocast_of
from posttrain.training.callbacks import StepCallback
from posttrain.training.seeding import seed_step

Reader = TypeVar("Reader", bound=PackedLM)
FirstValues = Callable[[Any], dict[str, Tensor]]  # the bare base -> tensors that what is put on it begins with


@dataclass(frozen=True)
class TrainableModel:
    """The model that a run trains and leaves. callback: what the method does in every optimizer step. counts: of parameters, by
    part, as the manifest says them. stream: of layers that come and go (`train.offload=layers`)."""

    module: PackedLM
    trained: int
    total: int
    dtype: torch.dtype
    callback: StepCallback | None
    counts: dict[str, Any]
    stream: LayerStream | None = None


def build_model(
    cfg: LanguageStage,
    start: InitSource,
    base: BaseInfo,
    num_steps: int,
    device: torch.device,
    scores: bool = False,
    tokens: Sequence[NewToken] = (),
    values_of: FirstValues | None = None,
) -> TrainableModel:
    """Load, quantize, put the method on it, over the start's adapter where there is one, and wrap. scores: as a reward model.
    tokens: those of `model.add_tokens`. values_of: None where peft makes them.

    Raises UserError for targets that match nothing, or ranks that do not fit.
    """
    dtype = cfg.base_dtype
    model: Any
    model, streamed = load_base(cfg, start, base, device)
    if not cfg.train.base_dropout:
        switch_off_dropout(model)
    if start.adapter:
        inherit(model, start.adapter)
    give_rows(model, tokens)
    values = values_of(model) if values_of else {}
    seed_step(cfg.train.seed, 0, 0)  # a new adapter's random half is the run's own
    if start.adapter and start.mode == "continue":
        model = cfg.peft.continue_from(model, start.adapter)
    else:
        if start.adapter and start.mode == "merge":
            model = merge_into(model, start.adapter)
        model = add_method(model, cfg.peft, num_steps)
        if values:
            cfg.peft.begin(model, values)
        if start.adapter and start.mode == "stack":
            add_frozen(model, start.adapter)
    stream = LayerStream(streamed, device).start() if streamed else None
    module = reader_of(cfg, model, device, PackedScorer if scores else PackedLM)
    if isinstance(module, PackedScorer) and start.scorer:
        module.load_head(start.scorer)
    counts = count_parameters(module)
    return TrainableModel(module, *counts, getattr(torch, dtype), cfg.peft.step_callback(model), record(module), stream)


def load_base(cfg: LanguageStage, start: InitSource, base: BaseInfo, device: torch.device) -> tuple[Any, list[Streamed]]:
    """The model, and those of its layers that come and go. Raises UserError."""
    config = cfg.quant.loading(str(device))
    # FSDP moves a layer at a time to its device, and never holds all of them there
    place = "cpu" if cfg.train.fsdp else str(device)
    extra = "say" if cfg.model.ignore_unexpected else "refuse"
    load = partial(load_causal, start.source, base.revision, cfg.base_dtype, place, pin_of(cfg.model), config, extra)
    if cfg.train.offload != "layers":
        # float32 is made of what this process keeps of the model alone (see `shard`)
        stored = cfg.train.fsdp and cfg.base_dtype == "float32" and not start.adapter
        return load(None, stored), []
    directory = resolve(start.source, base.revision).directory
    names = layer_names(without_values(directory))
    made = [FORM, digest(directory), cfg.base_dtype, cfg.quant.model_dump(exclude={"dense_layers"}), device.type]
    key = content_hash(*made, library_versions())
    flats = stored_layers(cache_root() / "layers" / key, names, load)
    model = load(lambda weight: not weight.startswith(tuple(f"{name}." for name in names)))
    return model, put_layers(model, flats)


def reader_of(cfg: LanguageStage, model: Any, device: torch.device, kind: type[Reader]) -> Reader:
    """What reads packs with `model`; its attention is chosen for the format that training computes in, autocast included."""
    with torch.autocast(device.type, torch.bfloat16, enabled=autocast_of(cfg, Device.at(device)) == "bf16"):
        return kind(model, cfg.model.attention, cfg.model.kernels, cfg.train.packing)
