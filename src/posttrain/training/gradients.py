"""The gradients of all processes made one, once an update.

Not by DistributedDataParallel. It cuts gradients into buckets anew after its first backward, and the place of a number in its
bucket decides in which order more than two processes add it up: a run that was stopped would go on with other bits.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor, nn

BUCKET_BYTES = 32 * 2**20  # enough for the network's full rate


def begin_alike(module: nn.Module) -> None:
    """Give every process rank 0's trained parameters. Every process must call it."""
    for p in module.parameters():
        if p.requires_grad:
            dist.broadcast(p.data, 0)


def average_gradients(module: nn.Module) -> None:
    """Put the mean over all processes into every gradient. Every process must call it.

    A parameter that some process has no gradient of counts as zero there; where no process has one, it stays without.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    missing = [i for i, p in enumerate(trained) if p.grad is None]
    have = torch.ones(len(trained), device=trained[0].device)
    have[missing] = 0.0
    for i in missing:
        trained[i].grad = torch.zeros_like(trained[i])
    for bucket in _buckets(cast(Tensor, p.grad) for p in trained):
        _average(bucket)
    dist.all_reduce(have)
    if missing:  # else the device need not be waited for
        for i, number in enumerate(have.tolist()):
            if not number:
                trained[i].grad = None


def _buckets(gradients: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one data type, in the parameters' order, which is the same at every step of every start."""
    bucket, held = list[Tensor](), 0
    for gradient in gradients:
        if bucket and (held + gradient.nbytes > BUCKET_BYTES or gradient.dtype != bucket[0].dtype):
            yield bucket
            bucket, held = [], 0
        bucket.append(gradient)
        held += gradient.nbytes
    yield bucket


def _average(bucket: list[Tensor]) -> None:
    flat = torch.cat([each.reshape(-1) for each in bucket])
    dist.all_reduce(flat)
    flat /= dist.get_world_size()
    for each, mean in zip(bucket, flat.split([each.numel() for each in bucket]), strict=True):
        each.copy_(mean.view_as(each))
