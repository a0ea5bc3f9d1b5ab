"""The memory that a backward pass needs, counted on the meta device."""

from __future__ import annotations

import copy
import warnings
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, PretrainedConfig

from posttrain.batch import Segment
from posttrain.config.choices import Kernels
from posttrain.config.interfaces import Method
from posttrain.models.kernels.attention import attention_function, register
from posttrain.models.kernels.experts import use_shapes
from posttrain.models.kernels.logprobs import block, token_logprobs
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.kernels.tiles import go_in_tiles
from posttrain.models.language.architecture import model_class
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.work import Work, as_autocast, autocast_to, cost, in_one_kernel, kept_by
from posttrain.models.peft.attach import add_method


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


class _Counted(torch.autograd.Function):
    """Attention on shapes alone: keeps what the flash kernels keep and does as many products as they, where the meta device would
    write out all scores. A query sees the keys up to its own place."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        ctx.save_for_backward(query, key, value, query.new_empty(*query.shape[:3], value.shape[-1]), _of_float32(query))
        with in_one_kernel():
            seen = _seen(query, key)
            return query @ query.new_empty(*query.shape[:2], query.shape[3], seen) @ value.new_empty(seen, value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *_ = ctx.saved_tensors
        seen, wide = _seen(query, key), query.shape
        with in_one_kernel():
            scores = query.new_empty(*wide[:3], seen)
            for _ in range(2):  # scores once more, and their gradient
                torch.matmul(query, query.new_empty(*wide[:2], wide[3], seen))
            for _ in range(2):  # gradients of key and value
                torch.matmul(scores.transpose(2, 3), query)
            of_query = torch.matmul(scores, query.new_empty(*wide[:2], seen, wide[3]))
        return of_query, torch.empty_like(key), torch.empty_like(value)


def _seen(query: Tensor, key: Tensor) -> int:
    """Keys that a query sees in the mean, where the last one sees all."""
    return max(1, key.shape[2] - query.shape[2] // 2)


def _of_float32(query: Tensor) -> Tensor:
    """The sums of a flash kernel, a number for each query."""
    return torch.empty(query.shape[:3], device=query.device)


def _counted(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
    return _Counted.apply(*as_autocast(query, key, value))  # pyright: ignore


COUNTED = "posttrain_counted"
register(COUNTED, attention_function("documents", _counted))


class Activations(NamedTuple):
    """Bytes that a backward pass needs, and what both passes compute, without recomputation. narrow: bytes without what goes in
    tiles where there is recomputation. forward, backward: of the body; head: of both passes of
    the head. reading: as people are told of it (models/language/reading.py)."""

    whole: float
    narrow: float
    forward: Work
    backward: Work
    head: Work
    reading: str

    @property
    def flops(self) -> float:
        """Of forward and backward."""
        return sum(operations for work in (self.forward, self.backward, self.head) for operations, _ in work)


def activations(
    model: nn.Module, tokens: int, sequences: int, kernels: Kernels = "auto", autocast: torch.dtype | None = None
) -> Activations:
    """What one micro-batch of `tokens` tokens in `sequences` documents keeps and computes. kernels: as `model.kernels`.
    autocast: in which products are computed, where not in the weights' own precision.

    The model really runs, on the meta device; what autograd keeps is counted once a storage.
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

        def read() -> Tensor:
            return lm.hidden(ids, mask, input_ids=ids)

        with autocast_to(autocast):
            hidden, found = cost(read, lambda hidden: [hidden], model.parameters())
            go_in_tiles(lm, max(1, tokens // 2))
            narrow = kept_by(read, model.parameters()) if tokens > 1 else found.kept
            go_in_tiles(lm, None)
        head = _head_work(lm, hidden)
    return Activations(found.kept, narrow, found.forward, found.backward, head, lm.reading.line)


def _head_work(lm: PackedLM, hidden: Tensor) -> Work:
    """Of the log-probs of all tokens, tile by tile as on a GPU. With autocast they are computed in the weights' precision."""
    given = torch.empty(hidden.shape, dtype=lm.head.weight.dtype, device="meta", requires_grad=True)
    target = torch.zeros(len(given), dtype=torch.int64, device="meta")
    _, found = cost(lambda: token_logprobs(given, target, lm.head, *block("cuda")), lambda logps: [logps])
    return found.forward + found.backward
