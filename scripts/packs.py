"""Packs that a way of attention must be right on, and all scores written out to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Segment
from posttrain.models.kernels.attention import attention_function
from posttrain.models.kernels.masks import DocumentMask

PACKS: dict[str, tuple[Segment, ...]] = {
    "one": (Segment(0, 7),),
    "documents": (Segment(0, 130), Segment(130, 135), Segment(135, 300)),
    "whole blocks": (Segment(0, 128), Segment(128, 384)),
    "shared": (
        Segment(0, 9), Segment(9, 150), Segment(150, 190, 9, 150), Segment(190, 330, 9, 150),
        Segment(330, 334), Segment(334, 336, 330, 334), Segment(336, 337, 330, 332),
    ),
    "group": (Segment(0, 5), *(Segment(a, a + 3, 0, 5) for a in range(5, 29, 3))),
}  # fmt: skip
HEADS, KEY_HEADS, SIZE = 4, 2, 8


def numbers_of(pack: str, memory: int = 0, dtype: torch.dtype = torch.float64) -> tuple[list[Tensor], DocumentMask]:
    """Query, key and value with the memory apart from them: the mask has it."""
    random, length = torch.Generator().manual_seed(0), PACKS[pack][-1].stop
    shapes = ((HEADS, length), (KEY_HEADS, length), (KEY_HEADS, length), (KEY_HEADS, memory), (KEY_HEADS, memory))
    found = [torch.randn(1, h, n, SIZE, generator=random, dtype=dtype, requires_grad=True) for h, n in shapes]
    mask = DocumentMask(PACKS[pack], length, torch.device("cpu"), [(found[3], found[4])] if memory else ())
    return (found if memory else found[:3]), mask


class Layer(torch.nn.Module):
    """As an attention layer of transformers calls its function."""

    layer_idx = 0


def values_and_gradients(how: str, pack: str, memory: int, dtype: torch.dtype = torch.float64, **options: Any) -> list[Tensor]:
    """Output, and the gradients of query, key, value, memory and sinks."""
    numbers, mask = numbers_of(pack, memory, dtype)
    if options.get("s_aux") is not None:
        options["s_aux"] = options["s_aux"].detach().to(dtype).requires_grad_()
        numbers.append(options["s_aux"])
    out, _ = attention_function(how)(Layer(), *numbers[:3], None, scaling=0.3, document_mask=mask, **options)
    chooses = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    return [out, *torch.autograd.grad((out * chooses).sum(), numbers)]


def plain_varlen(
    query: Tensor, key: Tensor, value: Tensor, cu_seq_q: Tensor, cu_seq_k: Tensor, max_q: int, max_k: int,
    *, scale: float | None = None, window_size: tuple[int, int] = (-1, -1), enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """torch.nn.attention.varlen.varlen_attn as its page and FlashAttention's describe it: row i of n queries stands at place
    i + (m - n) of its m keys, and sees those at most `left` before it and `right` after it."""
    assert cu_seq_q.dtype == cu_seq_k.dtype == torch.int32 and len(cu_seq_q) == len(cu_seq_k) and cu_seq_q[0] == cu_seq_k[0] == 0
    assert cu_seq_q[-1] == len(query) and cu_seq_k[-1] == len(key) == len(value)
    assert max_q == int(cu_seq_q.diff().max()) and max_k == int(cu_seq_k.diff().max())
    assert enable_gqa or query.shape[1] == key.shape[1]
    found = []
    for q0, q1, k0, k1 in zip(
        cu_seq_q[:-1].tolist(), cu_seq_q[1:].tolist(), cu_seq_k[:-1].tolist(), cu_seq_k[1:].tolist(), strict=True
    ):
        q, (k, v) = query[q0:q1], (x[k0:k1].repeat_interleave(query.shape[1] // key.shape[1], dim=1) for x in (key, value))
        scores = torch.einsum("nhd,mhd->hnm", q, k) * (q.shape[-1] ** -0.5 if scale is None else scale)
        place = torch.arange(q1 - q0)[:, None] + (k1 - k0) - (q1 - q0)
        column, (left, right) = torch.arange(k1 - k0)[None], window_size
        hidden = (column < place - left) if left >= 0 else torch.zeros(len(q), k1 - k0, dtype=torch.bool)
        hidden = hidden | (column > place + right) if right >= 0 else hidden
        found.append(torch.einsum("hnm,mhd->nhd", scores.masked_fill(hidden, -torch.inf).softmax(-1), v))
    return torch.cat(found)
