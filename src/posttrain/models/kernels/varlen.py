"""Attention by torch.nn.attention.varlen (FlashAttention): each segment's queries against its own stretch of keys, in one call.

A segment that sees a prompt, or memory, has their keys and values gathered before its own; the kernel's causal mask is aligned to
the end, so that its first token sees all of them. 16-bit numbers on CUDA; no softcap, no sinks, no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from inspect import signature
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention.varlen import varlen_attn

from posttrain.batch import Segment
from posttrain.models.kernels.masks import DocumentMask
from posttrain.tensors import upload


class Gather(NamedTuple):
    """rows: int64 [K], the key that stands at each place. uses: for each number c of places that some keys have, these keys [n]
    and their places [n, c]."""

    rows: Tensor
    uses: tuple[tuple[Tensor, Tensor], ...]


class Stretches(NamedTuple):
    """of_queries, of_keys: int32 [segments + 1], where each segment's begin. gather: None where keys lie as they are seen."""

    of_queries: Tensor
    of_keys: Tensor
    most_queries: int
    most_keys: int
    gather: Gather | None


def stretches(segments: Sequence[Segment], memory: int, device: torch.device) -> Stretches:
    """A pack as the kernel asks for it. memory: keys that stand before every document."""
    queries = [s.stop - s.start for s in segments]
    keys = [memory + s.prefix_stop - s.prefix_start + own for s, own in zip(segments, queries, strict=True)]
    borders = upload(torch.from_numpy(np.cumsum([[0, 0], *zip(queries, keys, strict=True)], axis=0).astype(np.int32)).T, device)
    of_queries, of_keys = borders.contiguous().unbind(0)
    gather = _gather(segments, memory, device) if keys != queries else None
    return Stretches(of_queries, of_keys, max(queries), max(keys), gather)


def _gather(segments: Sequence[Segment], memory: int, device: torch.device) -> Gather:
    seen = [(memory + begin, memory + end) for s in segments for begin, end in ((-memory, 0), s[2:], s[:2])]
    rows = np.concatenate([np.arange(*stretch) for stretch in seen])
    places, counts = np.argsort(rows, kind="stable"), np.bincount(rows)  # each key has a place: its own segment's, or all
    first, uses = np.cumsum(counts) - counts, list[tuple[Tensor, Tensor]]()
    for count in np.unique(counts):
        keys = np.flatnonzero(counts == count)
        at = places[first[keys][:, None] + np.arange(count)]
        uses.append((upload(torch.from_numpy(keys), device), upload(torch.from_numpy(at), device)))
    return Gather(upload(torch.from_numpy(rows), device), tuple(uses))


class _Gathered(torch.autograd.Function):
    """x[rows]. The backward adds up in float32 and in one order; torch's own adds as the threads of a GPU happen to come."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gather: Gather) -> Tensor:
        ctx.gather, ctx.shape = gather, x.shape
        return x.index_select(0, gather.rows)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        found = grads[0].new_empty(ctx.shape)
        for keys, places in ctx.gather.uses:
            wide = torch.promote_types(found.dtype, torch.float32)
            found.index_copy_(0, keys, grads[0][places].sum(1, dtype=wide).to(found.dtype))
        return found, None


def by_varlen(
    query: Tensor, key: Tensor, value: Tensor, mask: DocumentMask, *, scaling: float | None, window: int | None
) -> Tensor:
    """[1, heads, T, dim] -> [1, T, heads, dim]. key, value: with the memory before them."""
    pack = mask.once(("varlen",), lambda: stretches(mask.segments, mask.size, mask.device))
    queries, keys, values = (x[0].transpose(0, 1) for x in (query, key, value))
    if pack.gather is not None:
        keys, values = (_Gathered.apply(x, pack.gather) for x in (keys, values))
    reach = (-1, 0) if window is None or window >= pack.most_keys else (window - 1, 0)  # itself, and those before it
    options: dict[str, Any] = {"scale": scaling, "window_size": reach}
    if query.shape[1] != key.shape[1] and _asks_for_groups(varlen_attn):
        options["enable_gqa"] = True
    borders = pack.of_queries, pack.of_keys, pack.most_queries, pack.most_keys
    out: Any = varlen_attn(queries, keys, values, *borders, **options)
    return out[None]


@cache
def _asks_for_groups(function: Callable[..., Any]) -> bool:
    """Whether fewer heads of keys than of queries have to be asked for; torch 2.11 takes them as they are."""
    return "enable_gqa" in signature(function).parameters
