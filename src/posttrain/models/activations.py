"""What a backward pass needs to have kept, counted on the meta device, and how many layers must be recomputed for it to fit."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from posttrain.batch import Segment
from posttrain.config import schema
from posttrain.models.causal import PackedLM
from posttrain.models.masks import DocumentMask


def same_shapes(method: schema.Method) -> schema.Method:
    """A method that needs no weights to begin from, with the shapes of `method`: PiSSA and DoRA compute their start."""
    if method.method not in ("pissa", "dora"):  # type: ignore[attr-defined]
        return method
    fields = {key: value for key, value in method.model_dump().items() if key in schema.Lora.model_fields}
    return schema.Lora.model_validate({**fields, "method": "lora"})


class Activations(NamedTuple):
    """Bytes that a backward pass needs, without and with recomputation, and the operations of forward and backward without."""

    whole: float
    recomputed: float
    flops: float


def activations(model: nn.Module, tokens: int, sequences: int) -> Activations:
    """What one micro-batch of `tokens` tokens in `sequences` documents keeps and computes.

    The model really runs, on the meta device; what autograd keeps is counted once a storage. With recomputation it is every
    layer's input and one layer's inside.
    """
    lm = PackedLM(model, "documents")
    lm.train()
    kept: dict[int, tuple[Any, int]] = {}
    weights = {p.untyped_storage()._cdata for p in model.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = (storage, storage.nbytes())
        return tensor

    length = max(1, tokens // sequences)
    bounds = [*range(0, length * sequences, length), tokens]
    segments = tuple(Segment(a, b) for a, b in pairwise(bounds))
    with torch.device("meta"), saved_tensors_hooks(keep, lambda tensor: tensor), FlopCounterMode(display=False) as counter:
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        hidden = lm.hidden(ids, DocumentMask(segments, tokens, torch.device("meta")), input_ids=ids)
        if hidden.requires_grad:
            hidden.sum().backward()
    whole = float(sum(size for _, size in kept.values()))
    head: Any = lm.causal.get_output_embeddings()
    flops = counter.get_total_flops() + 4.0 * tokens * head.weight.numel()
    layers = lm.causal.config.get_text_config().num_hidden_layers
    inputs = float(hidden.numel() * hidden.element_size() * layers)
    return Activations(whole, min(whole, inputs + whole / layers), flops)


def layers_to_recompute(free: float, fixed: float, kept: float, inputs: float, layers: int) -> int:
    """How many of `layers` must be recomputed so that all fits in `free`. fixed: what else will be asked for; kept, inputs: bytes
    that a layer leaves for the backward, and what of it recomputation still needs."""
    over = fixed + layers * kept - free
    if over <= 0:
        return 0
    # the layer that is being recomputed is there in whole
    return min(layers, math.ceil((over + kept) / max(kept - inputs, 1.0)))
