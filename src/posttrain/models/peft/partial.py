"""Training a part of the model's own weights: the head, or the top layers with norm and head."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from torch import nn

from posttrain.console import say
from posttrain.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def train_head(model: PreTrainedModel) -> PreTrainedModel:
    """Freeze all but the output head."""
    model.requires_grad_(False)
    _own_head(model).requires_grad_(True)
    return model


def train_top(model: PreTrainedModel, layers: float) -> PreTrainedModel:
    """Freeze all but the top `layers` (a share of them below 1), the final norm and the head."""
    decoder: Any = model.get_decoder()
    blocks = next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)
    if blocks is None:
        raise UserError(f"peft.method: partial finds no list of layers in {type(model).__name__}; use peft=lora")
    count = math.ceil(layers * len(blocks)) if layers < 1 else int(layers)
    if count > len(blocks):
        raise UserError(f"peft.layers: {count} is more than the model's {len(blocks)} layers")
    model.requires_grad_(False)
    after = list(decoder.children())[list(decoder.children()).index(blocks) + 1 :]
    for module in (*list(blocks)[-count:], *after, _own_head(model)):
        module.requires_grad_(True)
    return model


def _own_head(model: PreTrainedModel) -> nn.Module:
    """The output head, with a weight of its own: trained while tied, it would change the input embeddings too."""
    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        say("the head was tied to the input embeddings; it is untied, so that only the head is trained")
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return head
