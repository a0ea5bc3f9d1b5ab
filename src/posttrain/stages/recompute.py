"""Recomputation of as many layers as memory asks for, and no more (`train.gradient_checkpointing=auto`)."""

from __future__ import annotations

import copy
import os
from typing import Any

import psutil
import torch
from torch import nn

from posttrain.config.schema import LanguageStage, Ppo
from posttrain.console import say
from posttrain.models.activations import activations, layers_to_recompute, model_of_shapes
from posttrain.models.causal import PackedLM
from posttrain.models.head import chunk_logits
from posttrain.stages.build import Built, Inputs

USED = 0.9  # of what is free; allocators do not fill it to the last byte
MOMENTS = 12  # bytes a trained number will yet ask for: its gradient and AdamW's two moments


def spare_memory(cfg: LanguageStage, module: nn.Module, built: Built, inputs: Inputs, device: torch.device) -> None:
    """Set how many layers of every model in `module` are recomputed."""
    wanted, depth = cfg.train.gradient_checkpointing, built.module.num_layers
    layers = {True: depth, False: 0}[wanted] if isinstance(wanted, bool) else wanted
    if layers == "auto":
        layers = _as_needed(cfg, built, inputs, device)
        if layers:
            say(f"{layers} of {depth} layers are recomputed in the backward to save memory (train.gradient_checkpointing=auto)")
    if layers:
        for part in module.modules():
            if isinstance(part, PackedLM):
                part.recompute(layers)


def free_bytes(device: torch.device) -> float:
    """What this process may still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return psutil.virtual_memory().available / int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _as_needed(cfg: LanguageStage, built: Built, inputs: Inputs, device: torch.device) -> int:
    tokens, sequences = _largest_batch(cfg, inputs), cfg.train.batch_size
    kept, first = (_kept(cfg, built, tokens, sequences, layers) for layers in (2, 1))
    if kept is None or first is None:
        return 0
    width = built.module.causal.config.get_text_config().hidden_size
    itemsize = built.dtype.itemsize
    fixed = MOMENTS * built.trained + 10.0 * chunk_logits(device.type) + 3.0 * tokens * width * itemsize
    return layers_to_recompute(
        USED * free_bytes(device), fixed, kept - first, float(tokens * width * itemsize), built.module.num_layers
    )


def _largest_batch(cfg: LanguageStage, inputs: Inputs) -> int:
    """Tokens that a micro-batch has at most."""
    if isinstance(cfg, Ppo):
        return cfg.train.batch_size * (cfg.train.max_length + (cfg.ppo.samples - 1) * cfg.rollout.max_new_tokens)
    sizes = sorted(inputs.data.train.unit_tokens().tolist(), reverse=True)
    return sum(sizes[: cfg.train.batch_size]) or cfg.train.max_length


def _kept(cfg: LanguageStage, built: Built, tokens: int, sequences: int, layers: int) -> float | None:
    """Bytes that a model of the same kind with `layers` layers keeps; None where it cannot be made so small."""
    config: Any = copy.deepcopy(built.module.causal.config)
    config.get_text_config().num_hidden_layers = layers
    if kinds := getattr(config.get_text_config(), "layer_types", None):
        config.get_text_config().layer_types = kinds[:layers]
    try:
        return activations(model_of_shapes(config, built.dtype, cfg.peft), tokens, sequences).whole
    except Exception:  # an architecture that refuses: then no estimate, and out of memory halves the micro-batches
        return None
