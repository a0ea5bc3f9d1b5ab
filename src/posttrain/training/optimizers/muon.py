"""Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon), PyTorch's own: the momentum of a hidden matrix, made orthogonal.

Embeddings, head and vectors learn by AdamW, as in the original. The update has the size of AdamW's (Liu et al. 2025, arXiv
2502.16982, section 2.2), so that one rate is for both.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from posttrain.training.optimizers._kind import Groups, OptimizerKind, Settings

if TYPE_CHECKING:
    from torch.optim import Optimizer


def _make(groups: Groups, settings: Settings) -> Optimizer:
    import torch

    from posttrain.errors import UserError
    from posttrain.training.optimizers import adamw
    from posttrain.training.optimizers._together import Together

    ours, others = ([group for group in groups if group["is_matrix"] is which] for which in (True, False))
    if not ours:
        raise UserError("optim.name: muon is for hidden matrices, and none is trained; say optim=adamw")
    own: Any = {"adjust_lr_fn": "match_rms_adamw", **settings.options}
    parts: list[Optimizer] = [torch.optim.Muon(ours, lr=settings.lr, **own)]
    if others:
        parts.append(adamw.OPTIMIZER.make(others, settings))
    return Together(parts)


OPTIMIZER = OptimizerKind(
    _make,
    lambda shape, is_matrix: math.prod(shape) * (1 if is_matrix else 2),
    options={"momentum": float, "nesterov": bool, "ns_steps": int},
    whole_matrices=True,
)
