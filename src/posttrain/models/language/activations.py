"""The memory that a backward pass needs, counted on the meta device, and how many layers must be recomputed to fit."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Iterable
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import scaled_dot_product_attention
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, PretrainedConfig

from posttrain.batch import Segment
from posttrain.config.choices import Kernels
from posttrain.config.interfaces import Method
from posttrain.models.kernels.attention import attention_function, register
from posttrain.models.kernels.experts import use_shapes
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.architecture import model_class
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method

KeptBytes = TypeVar("KeptBytes")


def model_of_shapes(config: PretrainedConfig, dtype: torch.dtype, method: Method) -> nn.Module:
    """The model with its method, on the meta device: shapes without values."""
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        model = model_class(config).from_config(copy.deepcopy(config), dtype=dtype)
        use_shapes(model)
        return add_method(model, method, 1000)


def llama_like(config: PretrainedConfig) -> LlamaConfig:
    """A Llama as wide and deep as another model, whose MLP is as wide as the experts that a token goes through."""
    text: Any = config.get_text_config()
    heads = text.num_attention_heads
    return LlamaConfig(
        vocab_size=text.vocab_size, hidden_size=text.hidden_size, num_hidden_layers=text.num_hidden_layers,
        num_attention_heads=heads, num_key_value_heads=_number(text, "num_key_value_heads") or heads,
        head_dim=_number(text, "head_dim") or text.hidden_size // heads, intermediate_size=_width_of_mlp(text),
    )  # fmt: skip


def _width_of_mlp(text: Any) -> int:
    dense = next((n for name in ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size") if (n := _number(text, name))), 0)
    expert = _number(text, "moe_intermediate_size") or _number(text, "expert_ffn_hidden_size") or dense
    taken = next(
        (n for name in ("num_experts_per_tok", "moe_topk", "moe_top_k", "top_k_experts") if (n := _number(text, name))), 0
    )
    return max(dense, expert * taken) or 4 * text.hidden_size


def _number(text: Any, name: str) -> int:
    found = getattr(text, name, None)
    return max(found, default=0) if isinstance(found, list) else found if isinstance(found, int) else 0


class Cost(NamedTuple):
    """Bytes that a forward pass leaves for the backward, each storage once and no parameter's, and the operations of both."""

    kept: float
    flops: float


def cost(
    forward: Callable[[], KeptBytes],
    outputs: Callable[[KeptBytes], list[Tensor]],
    weights: Iterable[Tensor] = (),
    operations: dict[Any, Any] | None = None,
) -> tuple[KeptBytes, Cost]:
    """What `forward` gives, and what it and the backward pass from its outputs cost. weights: of which views are not counted
    either. operations: how to count what torch's own counter does not know."""
    own = {weight.untyped_storage()._cdata for weight in weights}
    storages: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter) and tensor.untyped_storage()._cdata not in own:
            storages[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with FlopCounterMode(display=False, custom_mapping=operations) as counter:
        with saved_tensors_hooks(keep, lambda tensor: tensor):
            found = forward()
        if trained := [output.sum() for output in outputs(found) if output.requires_grad]:
            torch.stack(trained).sum().backward()
    return found, Cost(float(sum(storage.nbytes() for storage in storages.values())), float(counter.get_total_flops()))


class _Counted(torch.autograd.Function):
    """Attention on shapes alone: keeps what the flash kernels keep and does as many products as they, where the meta device would
    write out all scores."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out = scaled_dot_product_attention(query, key, value, enable_gqa=query.shape[1] != key.shape[1])
        ctx.save_for_backward(query, key, value, out, torch.empty(query.shape[:3], device="meta"))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        wide, long = query.shape, key.shape[2]
        scores = query.new_empty(*wide[:3], long)
        for _ in range(2):  # scores once more, and their gradient
            torch.matmul(query, query.new_empty(*wide[:2], wide[3], long))
        for _ in range(2):  # gradients of key and value
            torch.matmul(scores.transpose(2, 3), query)
        return torch.matmul(scores, query.new_empty(*wide[:2], long, wide[3])), torch.empty_like(key), torch.empty_like(value)


def _counted(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Counted.apply(query, key, value)  # pyright: ignore


COUNTED = "posttrain_counted"
register(COUNTED, attention_function("documents", _counted))


class Activations(NamedTuple):
    """Bytes that a backward pass needs, without and with recomputation, and the operations of forward and backward without.
    reading: as people are told of it (models/language/reading.py)."""

    whole: float
    recomputed: float
    flops: float
    reading: str


def activations(model: nn.Module, tokens: int, sequences: int, kernels: Kernels = "auto") -> Activations:
    """What one micro-batch of `tokens` tokens in `sequences` documents keeps and computes. kernels: as `model.kernels`.

    The model really runs, on the meta device; what autograd keeps is counted once a storage. With recomputation it is every
    layer's input and one layer's inside.
    """
    lm = PackedLM(model, kernels=kernels)
    if lm.reading.attention == "documents":
        lm.causal.set_attn_implementation(COUNTED)
    lm.train()
    length = max(1, tokens // sequences)
    bounds = [*range(0, length * sequences, length), tokens]
    segments = tuple(Segment(a, b) for a, b in pairwise(bounds))
    with torch.device("meta"):
        ids = torch.zeros(1, tokens, dtype=torch.int64)
        mask = DocumentMask(segments, tokens, torch.device("meta"))
        hidden, (whole, flops) = cost(lambda: lm.hidden(ids, mask, input_ids=ids), lambda hidden: [hidden], model.parameters())
    head: Any = lm.causal.get_output_embeddings()
    layers = lm.causal.config.get_text_config().num_hidden_layers
    inputs = float(hidden.numel() * hidden.element_size() * layers)
    return Activations(whole, min(whole, inputs + whole / layers), flops + 4.0 * tokens * head.weight.numel(), lm.reading.line)


def layers_to_recompute(free: float, fixed: float, kept: float, inputs: float, layers: int) -> int:
    """How many of `layers` must be recomputed so that all fits in `free`. fixed: what else will be asked for; kept, inputs: bytes
    that a layer leaves for the backward, and what of it recomputation still needs."""
    over = fixed + layers * kept - free
    if over <= 0:
        return 0
    # the layer that is being recomputed is there in whole
    return min(layers, math.ceil((over + kept) / max(kept - inputs, 1.0)))


def layers_to_keep_dense(
    free: float, fixed: float, kept: float, inputs: float, recomputed: int, dense: float, layers: int
) -> int:
    """Of how many of `layers` a dense copy of `dense` bytes has room beside what `layers_to_recompute` counts.

    All this is an estimate: half of what seems left is not touched.
    """
    inside = kept if recomputed else 0.0
    left = free - fixed - (layers - recomputed) * kept - recomputed * inputs - inside
    return max(0, min(layers, math.floor(left / 2 / max(dense, 1.0))))
