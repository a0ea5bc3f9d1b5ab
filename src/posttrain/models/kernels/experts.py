"""Fused experts on shapes alone: which expert a token goes to is a value, and there are none on the meta device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

SHAPES = "posttrain_shapes"


def use_shapes(model: nn.Module) -> None:
    """Let the experts of a model without weights keep and compute as much as those of one with them."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = SHAPES


def experts_on_shapes(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """As transformers' own ways of computing experts: every pair of a token and an expert is a row of both products."""
    pairs = torch.arange(top_k_index.numel(), device=hidden_states.device)
    rows = hidden_states[pairs // top_k_index.shape[-1]]
    if self.has_gate:
        rows = self._apply_gate(_product(self, rows, self.gate_up_proj, "gate_up_proj_bias", pairs))
    else:
        rows = self.act_fn(_product(self, rows, self.up_proj, "up_proj_bias", pairs))
    rows = _product(self, rows, self.down_proj, "down_proj_bias", pairs)
    weighted = rows * top_k_weights.reshape(-1, 1)
    return weighted.view(*top_k_index.shape, -1).sum(dim=-2).to(hidden_states.dtype)


def _product(self: Any, rows: Tensor, weights: Tensor, bias: str, pairs: Tensor) -> Tensor:
    one = weights[0] if self.is_transposed else weights[0].T
    product = rows @ one.to(rows.dtype)
    return product + getattr(self, bias)[pairs] if self.has_bias else product


ALL_EXPERTS_FUNCTIONS.register(SHAPES, experts_on_shapes)
