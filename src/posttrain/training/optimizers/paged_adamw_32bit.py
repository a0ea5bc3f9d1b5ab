"""AdamW of bitsandbytes (Dettmers et al. 2021, arXiv 2110.02861): moments in 32 bits, in paged memory."""

from __future__ import annotations

from posttrain.training.optimizers._bitsandbytes import adamw_of

OPTIMIZER = adamw_of("PagedAdamW32bit", paged=True)
