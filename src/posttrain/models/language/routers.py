"""Which mixtures of experts have a loss for their routers' balance in transformers, and how much of it is wanted."""

from __future__ import annotations

import inspect
import sys
from typing import Any, Literal

from transformers import PreTrainedModel

from posttrain.errors import UserError
from posttrain.models.language.decoder import decoder_of

OURS = ["gate_logits", "num_experts", "top_k", "attention_mask"]  # what Switch Transformer's loss is computed of


def experts_a_token(causal: PreTrainedModel) -> int:
    """How many experts its routers choose; 0 for a model without routers, and where transformers has not this loss for it."""
    theirs = getattr(sys.modules[type(causal).__module__], "load_balancing_loss_func", None)
    records: Any = getattr(decoder_of(causal), "_can_record_outputs", None) or {}
    if theirs is None or list(inspect.signature(theirs).parameters) != OURS or "router_logits" not in records:
        return 0
    config = causal.config.get_text_config()
    return int(getattr(causal, "num_experts_per_tok", None) or getattr(config, "num_experts_per_tok", None) or 0)


def router_coefficient(causal: PreTrainedModel, wanted: Literal["auto"] | float) -> float:
    """`train.router_aux_loss` of this model. auto: what transformers would add to the loss by the model's config.

    Raises UserError where a loss is asked for that the model has not.
    """
    has_routers = experts_a_token(causal) > 0
    if wanted == "auto":
        configs = (causal.config, causal.config.get_text_config())
        asked = any(getattr(config, "output_router_logits", False) for config in configs)
        return _own(causal) if asked and has_routers else 0.0
    if wanted and not has_routers:
        kind = type(causal).__name__
        raise UserError(f"train.router_aux_loss: transformers has no loss for routers of {kind}; say train.router_aux_loss=0")
    return float(wanted)


def _own(causal: Any) -> float:
    for place in (causal, causal.config.get_text_config()):
        for name in ("router_aux_loss_coef", "aux_loss_coef"):
            if (found := getattr(place, name, None)) is not None:
                return float(found)
    return 0.0
