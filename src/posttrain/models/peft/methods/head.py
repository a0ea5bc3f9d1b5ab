"""The output head alone, all else frozen: feature extraction."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from posttrain.console import say
from posttrain.models.peft.base import OwnWeights

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel


class Head(OwnWeights):
    """The output head alone."""

    method: Literal["head"]

    def attach(self, model: PreTrainedModel, num_steps: int, task: str | None) -> PreTrainedModel:
        model.requires_grad_(False)
        own_head(model).requires_grad_(True)
        return model


METHOD = Head


def own_head(model: PreTrainedModel) -> nn.Module:
    """The output head, with a weight of its own: trained while tied, it would change the input embeddings too."""
    from torch import nn

    head: Any = model.get_output_embeddings()
    embeddings: Any = model.get_input_embeddings()
    if head.weight is embeddings.weight:
        say("the head was tied to the input embeddings; it is untied, so that only the head is trained")
        head.weight = nn.Parameter(head.weight.detach().clone())
        for config in {id(c): c for c in (model.config, model.config.get_text_config())}.values():
            config.tie_word_embeddings = False
        model.all_tied_weights_keys = {}
    return head
