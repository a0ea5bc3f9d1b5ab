"""What the optimizers of bitsandbytes have in common."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from posttrain.training.optimizers._kind import Groups, Instead, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch import Size
    from torch.optim import Optimizer

# From here on moments are worth paging: LoRA of rank 16 on 8 billion weights has 0.31 GiB of them, of rank 64 1.25.
LARGE_MOMENTS = 2**30
MOMENTS = 8  # bytes a trained number, in float32
SMALLEST_IN_8_BIT = 4096  # numbers; bitsandbytes keeps the moments of smaller tensors in 32 bit
BLOCK_OF_MOMENTS = 256  # that share a constant


def adamw_of(name: str, paged: bool = False, eight_bit: bool = False) -> OptimizerKind:
    """AdamW of this class. It exists on CUDA; elsewhere, and where paging does not pay, plain AdamW takes its place."""

    def make(groups: Groups, settings: Settings) -> Optimizer:
        from bitsandbytes.optim import adamw

        return getattr(adamw, name)(groups, lr=settings.lr, **settings.given)

    def instead(numbers: int, on_cuda: bool, sharded: bool) -> Instead | None:
        if sharded:
            return Instead("does not shard (train.fsdp)")
        if not on_cuda:
            return Instead("needs CUDA")
        if paged and MOMENTS * numbers < LARGE_MOMENTS:
            size = f"{MOMENTS * numbers / 2**30:.2f} GiB"
            return Instead(f"waits for the device at every weight, to page moments that would take {size}", runs=True)
        return None

    def in_8_bit(shape: Size) -> float:
        numbers = math.prod(shape)
        if numbers < SMALLEST_IN_8_BIT:
            return 8.0 * numbers
        return 2.0 * (numbers + 4 * -(-numbers // BLOCK_OF_MOMENTS))

    return OptimizerKind(
        make,
        lambda shape, _: 2 * math.prod(shape),
        width=4,
        bytes_of=in_8_bit if eight_bit else None,
        instead=instead,
        moments="bitsandbytes",
        shards=True,
    )
