"""Attention within a pack, in four ways of computing the same thing; who sees whom is `masks.py`.

Each is an attention function of transformers' AttentionInterface. The pack's `DocumentMask` travels as a keyword of
the model's forward; without one (generation) the functions behave as plain causal attention.
varlen: FlashAttention over stretches of keys (CUDA, 16 bits). flex: FlexAttention's sparse blocks (CUDA), for softcap and sinks.
documents: segment by segment, or short ones side by side, so next to nothing is computed that a mask would throw away. dense: one
explicit [T, T] mask, for attention that needs all scores (softcap, sinks), and the plain reference of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import dropout as drop
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from posttrain.errors import UserError
from posttrain.models.kernels.flex import by_flex
from posttrain.models.kernels.masks import Asked, Band, DocumentMask, Run, context_mask
from posttrain.models.kernels.usable import HALF
from posttrain.models.kernels.varlen import by_varlen

Sdpa = Callable[..., Tensor]  # as torch's scaled_dot_product_attention
ATTENTION = {name: f"posttrain_{name}" for name in ("varlen", "flex", "documents", "dense")}
ON_CUDA = ("varlen", "flex")  # kernels that are tried before they are taken (usable.py)
# kinds of layers, by their names in configs (layer_types)
FULL, SLIDING = {"full_attention", "hybrid"}, {"sliding_attention", "hybrid_sliding"}
STATEFUL, NO_ATTENTION = {"linear_attention", "conv", "hybrid", "hybrid_sliding"}, {"linear_attention", "conv", "moe"}
# Tokens of a run whose scores a CPU writes out in half precision: half of the flash kernel's time for documents of 128 tokens,
# two thirds of it for 512, four fifths for 1,024, and more than it beyond.
WRITTEN_OUT = 1024


class CannotCompute(Exception):
    """This way of attention is not made for what the model asks of it."""


def _scores_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor,
    *, dropout: float, scaling: float | None, softcap: float | None, s_aux: Tensor | None,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention with all scores written out, as transformers' eager ones: softcap (Gemma 2), sinks s_aux (gpt-oss)."""
    groups = query.shape[1] // key.shape[1]
    scores = query @ repeat_kv(key, groups).transpose(2, 3) * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if s_aux is not None:
        sinks = s_aux.reshape(1, -1, 1, 1).expand(scores.shape[0], -1, scores.shape[2], -1)
        scores = torch.cat([scores, sinks.to(scores.dtype)], dim=-1)
    weights = scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype)[..., : key.shape[2]]
    output = drop(weights, dropout, module.training) @ repeat_kv(value, groups)
    return output.transpose(1, 2).contiguous(), None


def _plain_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
    *, dropout: float, scaling: float | None, softcap: float | None, s_aux: Tensor | None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """No pack: what the model does by itself, with the mask that transformers made."""
    if softcap is None and s_aux is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout, scaling, **kwargs)
    if attention_mask is None:
        queries, keys = query.shape[2], key.shape[2]
        attention_mask = context_mask(keys - queries, queries, None, query.device)
    return _scores_attention(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, softcap=softcap, s_aux=s_aux
    )


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask,
    *, dropout: float, scaling: float | None, window: int | None, sdpa: Sdpa = scaled_dot_product_attention,
) -> Tensor:  # fmt: skip
    """[1, heads, T, dim] -> the same shape, run by run. key, value: with the memory before them."""
    remembered = key[:, :, : mask.size], value[:, :, : mask.size]
    writes = query.device.type == "cpu" and query.dtype != torch.float32 and not dropout
    parts = mask.runs if writes else [mask.whole]
    # split, not slices: its backward is one concatenation, where each slice's would fill a whole zero tensor
    pieces = [x.split([run.length for run in parts], dim=2) for x in (query, key[:, :, mask.size :], value[:, :, mask.size :])]
    outputs = []
    for run, q, k, v in zip(parts, *pieces, strict=True):
        if writes and run.length <= WRITTEN_OUT:
            k, v = (torch.cat(both, dim=2) if mask.size else both[1] for both in zip(remembered, (k, v), strict=True))
            scale = q.shape[-1] ** -0.5 if scaling is None else scaling
            outputs.append(_WrittenOut.apply(q, k, v, mask.bands(run, window), scale))
        else:
            outputs += _by_segment(q, k, v, remembered, run, mask, dropout=dropout, scaling=scaling, window=window, sdpa=sdpa)
    return torch.cat(outputs, dim=2)


class _WrittenOut(torch.autograd.Function):
    """softmax(s q k' + bias) v of one run, scores and softmax in float32, computed again in the backward. It goes band by band,
    so that what is written out stays in a CPU's caches.

    query: [1, heads, n, dim]; key: [1, key heads, m, dim]; value: [1, key heads, m, own dim].
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, bands: Sequence[Band], scale: float) -> Tensor:
        ctx.save_for_backward(query, key, value)
        ctx.bands, ctx.scale = bands, scale
        wide, output = key[0].float(), query.new_empty(*query.shape[:3], value.shape[-1])
        for rows, columns, bias in bands:
            queries = query[:, :, rows]
            chances = _chances(queries, _seen(wide, columns), bias, scale).to(query.dtype)
            output[:, :, rows] = (chances @ _seen(value[0], columns)).view(*queries.shape[:3], -1)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value = ctx.saved_tensors
        wide, of_query = key[0].float(), torch.empty_like(query)
        of_key, of_value = (torch.zeros(x.shape[1:]) for x in (key, value))
        for rows, columns, bias in ctx.bands:
            queries, grad = query[:, :, rows], _grouped(grads[0][:, :, rows], wide)
            chances = _chances(queries, _seen(wide, columns), bias, ctx.scale)
            _add(of_value, columns, chances.to(grad.dtype).transpose(1, 2) @ grad)
            of_chances = (grad @ _seen(value[0], columns).transpose(1, 2)).float()
            pulled = (of_chances * chances).sum(-1, keepdim=True)
            of_scores = of_chances.sub_(pulled).mul_(chances).mul_(ctx.scale).to(grad.dtype)
            of_query[:, :, rows] = (of_scores @ _seen(key[0], columns)).view(queries.shape)
            _add(of_key, columns, of_scores.transpose(1, 2) @ _grouped(queries, wide))
        return of_query, of_key.to(key.dtype)[None], of_value.to(value.dtype)[None], None, None


def _seen(x: Tensor, columns: Sequence[slice]) -> Tensor:
    """Of keys or values [key heads, m, dim] those of a band."""
    parts = [x[:, some] for some in columns]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def _add(total: Tensor, columns: Sequence[slice], part: Tensor) -> None:
    """Add what belongs to a band's keys or values to that of all."""
    for some, own in zip(columns, part.split([some.stop - some.start for some in columns], dim=1), strict=True):
        total[:, some] += own


def _grouped(query: Tensor, key: Tensor) -> Tensor:
    """[1, heads, n, dim] -> [key heads, heads of each * n, dim]: the queries of one key head (of `key`'s) are one matrix."""
    return query.reshape(len(key), -1, query.shape[-1])


def _chances(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """float32 [key heads, heads of each * n, m], of float32 keys [key heads, m, dim]."""
    scores = (_grouped(query, key).float() * scale) @ key.transpose(1, 2)
    scores.view(-1, *bias.shape).add_(bias)
    return scores.softmax(-1)


def _by_segment(
    query: Tensor, key: Tensor, value: Tensor, remembered: tuple[Tensor, Tensor], run: Run, mask: DocumentMask,
    *, dropout: float, scaling: float | None, window: int | None, sdpa: Sdpa,
) -> list[Tensor]:  # fmt: skip
    """One call of SDPA for each segment of a run."""
    grouped = query.shape[1] != key.shape[1]
    lengths = [s.stop - s.start for s in run.segments]
    queries, keys, values = (x.split(lengths, dim=2) for x in (query, key, value))
    at = {s.start: i for i, s in enumerate(run.segments)}
    outputs = []
    for i, (segment, length) in enumerate(zip(run.segments, lengths, strict=True)):
        parts, before = [(keys[i], values[i])], mask.size + segment.prefix_stop - segment.prefix_start
        if before > mask.size:
            shared, size = at[segment.prefix_start], segment.prefix_stop - segment.prefix_start
            whole = size == lengths[shared]  # a prompt; else the beginning of a document
            parts.insert(0, (keys[shared], values[shared]) if whole else (keys[shared][:, :, :size], values[shared][:, :, :size]))
        if mask.size:
            parts.insert(0, remembered)
        k, v = (torch.cat(both, dim=2) if len(parts) > 1 else both[0] for both in zip(*parts, strict=True))
        beyond = window is not None and before + length > window
        context = mask.context(before, length, window if beyond else None) if before or beyond else None
        outputs.append(sdpa(queries[i], k, v, context, dropout, is_causal=context is None, scale=scaling, enable_gqa=grouped))
    return outputs


def attention_function(how: str, sdpa: Sdpa = scaled_dot_product_attention) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """For transformers' AttentionInterface. how: a name of ATTENTION. sdpa: what computes a segment of `documents`."""

    def forward(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None,
        dropout: float = 0.0, scaling: float | None = None, sliding_window: int | None = None,
        softcap: float | None = None, s_aux: Tensor | None = None, position_bias: Tensor | None = None,
        document_mask: DocumentMask | None = None, **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        extra = {"softcap": softcap, "s_aux": s_aux}
        if document_mask is None:
            return _plain_attention(
                module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **extra, **kwargs
            )
        if position_bias is not None:
            raise CannotCompute("its attention has a position bias")
        if attention_mask is not None and attention_mask.numel() > 1:  # a pack's own is a single True
            raise CannotCompute("its attention adds a mask of its own making")
        heads, size = query.shape[1], query.shape[3]
        asked = Asked(heads, key.shape[1], size, value.shape[3], sliding_window, softcap, s_aux is not None)
        document_mask.asked.append(asked)
        if document_mask.memory:
            remembered: Any = document_mask.memory[module.layer_idx]  # pyright: ignore
            key, value = (torch.cat([m.to(x), x], dim=2) for m, x in zip(remembered, (key, value), strict=True))
        if how == "dense":
            dense = document_mask.dense(sliding_window)[None, None]
            return _scores_attention(module, query, key, value, dense, dropout=dropout, scaling=scaling, **extra)
        if how in ON_CUDA:
            query, key, value = _of_one_format(query, key, value)
        options: dict[str, Any] = {"scaling": scaling, "window": sliding_window}
        if how == "flex":
            return by_flex(query, key, value, document_mask, softcap=softcap, sinks=s_aux, **options), None
        if softcap is not None or s_aux is not None:
            raise CannotCompute(f"{how} cannot compute its softcap or sinks")
        if how == "varlen" and query.dtype in HALF:
            return by_varlen(query, key, value, document_mask, **options), None
        # documents, and a call in float32 of a model that else computes in 16 bits
        output = _by_document(query, key, value, document_mask, dropout=dropout, sdpa=sdpa, **options)
        return output.transpose(1, 2).contiguous(), None

    return forward


def _of_one_format(*inputs: Tensor) -> Iterable[Tensor]:
    """Under autocast what its products give; a norm after them widens queries and keys, which a kernel does not take."""
    device = inputs[0].device.type
    return [x.to(torch.get_autocast_dtype(device)) for x in inputs] if torch.is_autocast_enabled(device) else inputs


def register(name: str, function: Callable[..., Any]) -> None:
    """Make an attention function known to transformers. The mask is SDPA's, for the calls without a pack."""
    AttentionInterface.register(name, function)
    AttentionMaskInterface.register(name, sdpa_mask)


for _how, _name in ATTENTION.items():
    register(_name, attention_function(_how))


def ways_of_attention(asked: str, device: torch.device) -> tuple[str, ...]:
    """What `model.attention` lets be tried on this device, the fastest first. asked: auto, or a name of ATTENTION."""
    if asked != "auto":
        return (asked,)
    return tuple(ATTENTION) if device.type == "cuda" else ("documents", "dense")


def check_attention(asked: str, device: torch.device) -> None:
    """Raises UserError for varlen and flex where there is no kernel of it to train with."""
    if asked in ON_CUDA and device.type != "cuda":
        raise UserError(f"model.attention: {asked} needs a CUDA device, and this one is {device.type}; say documents or auto")


def carries_state(model: PreTrainedModel) -> bool:
    """Has it layers that hand a state from token to token (a recurrence, a short convolution), which no mask reaches?"""
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ())
    stateful = any(getattr(type(module), "_is_stateful", False) for module in model.modules())
    return stateful or bool(types & STATEFUL)


def attention_windows(config: PretrainedConfig) -> list[int | None]:
    """The window of each layer with attention, None for full attention. ValueError for layers of kinds that are not known."""
    types = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    if types is None:
        pictures = getattr(config, "cross_attention_layers", None) or ()  # which text skips
        return [window] * (config.num_hidden_layers - len(pictures))
    if unknown := sorted(set(types) - FULL - SLIDING - NO_ATTENTION):
        raise ValueError(f"layers of type {', '.join(unknown)} are not known to keep documents apart")
    return [window if kind in SLIDING else None for kind in types if kind not in NO_ATTENTION]
