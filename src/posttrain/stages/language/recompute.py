"""Memory for time: recomputation of as many layers as memory asks for and no more (`train.gradient_checkpointing=auto`), and
dense copies of as many layers' 4-bit weights as it has room for (`quant.dense_layers=auto`)."""

from __future__ import annotations

import copy
import os
from typing import Any, NamedTuple

import psutil
import torch
from torch import nn

from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.devices.device import Device
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.activations import Activations, activations, model_of_shapes
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.room import Layers
from posttrain.models.offload.stream import LayerStream
from posttrain.models.quantization.nf4 import dense_bytes, keep_dense
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.precision import autocast_of
from posttrain.training.optimizer import optimizer_used, state_bytes

# By this process: jobs of a sweep have the same shapes, and counting takes a second.
_COUNTED: dict[tuple[Any, ...], Activations] = {}
USED = 0.9  # of what is free; allocators do not fill it to the last byte


def fit_memory(cfg: LanguageStage, module: nn.Module, built: TrainableModel, tokens: int, device: torch.device) -> None:
    """Set how many layers of every model in `module` are recomputed, and of how many NF4 weights are kept dense. tokens: of the
    largest micro-batch."""
    if built.stream:
        _stream(built.module, built.stream)
        return
    lm, wanted = built.module, cfg.train.gradient_checkpointing
    if cfg.train.offload == "activations":
        wanted = True if wanted == "auto" else wanted  # then it is the layers' inputs alone that go and come
        _send_away(module)
    dense = cfg.quant.kept_dense if cfg.model.kernels == "auto" else 0  # bitsandbytes' own layers know of no dense copies
    free, asked = USED * free_bytes(device), _asked(cfg, built, tokens, device) if "auto" in (wanted, dense) else None
    layers = {True: lm.num_layers, False: 0}[wanted] if isinstance(wanted, bool) else wanted
    if layers == "auto":
        layers = asked.layers.to_recompute(free - asked.fixed) if asked else 0
        if layers:
            are = "layers are recomputed in the backward to save memory"
            say(f"{layers} of {lm.num_layers} {are} (train.gradient_checkpointing=auto)")
    if layers:
        for part in module.modules():
            if isinstance(part, PackedLM):
                part.recompute(layers)
    if dense == "auto":
        dense = asked.layers.to_keep_dense(free - asked.fixed, layers, dense_bytes(lm.layers[0])) if asked else 0
        say(f"{dense} of {lm.num_layers} layers have a dense copy of their 4-bit weights (quant.dense_layers=auto)")
    if dense:
        keep_dense(lm.layers[:dense])


def _send_away(module: nn.Module) -> None:
    for part in module.modules():
        if isinstance(part, PackedLM):
            part.sends_away = True


def _stream(lm: PackedLM, stream: LayerStream) -> None:
    """Have all layers recomputed, for they come and go."""
    lm.recompute(lm.num_layers, tile=None)  # weights go as soon as a layer is computed again, before its tiles would be
    stream.recompute()
    say(f"{len(stream.layers)} layers of {stream.bytes / 1e9:.3g} GB come one at a time from {stream.place}, and are recomputed")


def free_bytes(device: torch.device) -> float:
    """What this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


class Asked(NamedTuple):
    """What training will yet ask for. fixed: bytes beside activations; layers: what they leave for the backward."""

    fixed: float
    layers: Layers


def _asked(cfg: LanguageStage, built: TrainableModel, tokens: int, device: torch.device) -> Asked | None:
    """None where it cannot be counted."""
    sequences = cfg.train.batch_size
    two, one = (_counted(cfg, built, tokens, sequences, layers) for layers in (2, 1))
    if two is None or one is None:
        return None
    layers = built.module.num_layers
    # a layer's, with a share of what lies in none, as a plan counts it
    kept, narrow = (b - a + (2 * a - b) / layers for a, b in ((one.whole, two.whole), (one.narrow, two.narrow)))
    width = built.module.causal.config.get_text_config().hidden_size
    inputs = float(tokens * width * built.dtype.itemsize)
    fixed = _shared(cfg, built) if cfg.train.fsdp else _trained(cfg, built, device)
    fixed += head_bytes(built.module.head.weight, tokens, device.type)
    return Asked(fixed, Layers.of(kept, narrow, inputs, layers, tokens))


def _trained(cfg: LanguageStage, built: TrainableModel, device: torch.device) -> float:
    """Gradients and moments; weights are there."""
    used, _ = optimizer_used(cfg.optim.name, built.trained, device.type, cfg.train.fsdp)
    return sum(p.nbytes for p in built.module.parameters() if p.requires_grad) + state_bytes(used, built.module)


def _shared(cfg: LanguageStage, built: TrainableModel) -> float:
    """This process's part of weights, which are yet to come here, gradients and AdamW's moments; and what is whole while it is
    computed: a layer, the next one, and what lies in none. In the format that weights have once they are sharded."""
    lm, least = built.module, built.dtype.itemsize
    sizes = {id(p): p.numel() * max(least, p.element_size()) for p in lm.parameters()}
    trained = sum(sizes[id(p)] for p in {id(p): p for p in lm.parameters()}.values() if p.requires_grad)
    layers = [sum(sizes[id(p)] for p in unit.parameters()) for unit in lm.units]
    whole = sum(sizes.values())
    gathered = (whole - sum(layers) + 2 * max(layers, default=0)) * (0.5 if autocast_of(cfg, Device.here()) == "bf16" else 1.0)
    return (whole + 3 * trained) / cfg.train.processes + gathered


def largest_batch(cfg: LanguageStage, data: PreparedData) -> int:
    """Tokens that a micro-batch of the data's units has at most."""
    sizes = sorted(data.data.train.unit_tokens().tolist(), reverse=True)
    return sum(sizes[: cfg.train.batch_size]) or cfg.train.max_length


def _counted(cfg: LanguageStage, built: TrainableModel, tokens: int, sequences: int, layers: int) -> Activations | None:
    """What a model of the same kind with `layers` layers keeps; None where it cannot be made so small."""
    try:
        config: Any = copy.deepcopy(built.module.causal.config)
        config.get_text_config().num_hidden_layers = layers
        if kinds := getattr(config.get_text_config(), "layer_types", None):
            config.get_text_config().layer_types = kinds[:layers]
        method, shapes = cfg.peft.model_dump_json(), config.to_json_string(use_diff=False)
        autocast = torch.bfloat16 if autocast_of(cfg, Device.here()) == "bf16" else None
        asked = (type(config), shapes, built.dtype, method, tokens, sequences, cfg.model.kernels, autocast)
        if asked not in _COUNTED:
            model = model_of_shapes(config, built.dtype, cfg.peft)
            _COUNTED[asked] = activations(model, tokens, sequences, cfg.model.kernels, autocast)
        return _COUNTED[asked]
    except Exception:  # an architecture that refuses: then no estimate, and out of memory halves the micro-batches
        return None
