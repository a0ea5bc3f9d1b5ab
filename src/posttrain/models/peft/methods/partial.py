"""The top layers with final norm and head, all else frozen."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.fields import Rate
from posttrain.errors import UserError
from posttrain.models.peft.base import OwnWeights
from posttrain.models.peft.methods.head import own_head

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Partial(OwnWeights):
    """The top layers, the final norm and the head."""

    method: Literal["partial"]
    layers: Rate  # how many at the top, or below 1 their share

    def attach(self, model: PreTrainedModel, num_steps: int, task: str | None) -> PreTrainedModel:
        """Raises UserError for more layers than there are."""
        from torch import nn

        decoder: Any = model.get_decoder()
        blocks = next((m for m in decoder.children() if isinstance(m, nn.ModuleList)), None)
        if blocks is None:
            raise UserError(f"peft.method: partial finds no list of layers in {type(model).__name__}; use peft=lora")
        count = math.ceil(self.layers * len(blocks)) if self.layers < 1 else int(self.layers)
        if count > len(blocks):
            raise UserError(f"peft.layers: {count} is more than the model's {len(blocks)} layers")
        model.requires_grad_(False)
        after = list(decoder.children())[list(decoder.children()).index(blocks) + 1 :]
        for module in (*list(blocks)[-count:], *after, own_head(model)):
            module.requires_grad_(True)
        return model


METHOD = Partial
