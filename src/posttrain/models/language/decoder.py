"""Which part of a model turns tokens into last hidden states: what every stage runs, and what is trained of a larger model."""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


def decoder_of(causal: PreTrainedModel) -> nn.Module:
    """Embeddings, layers and final norm of the language model, without its head and without what reads pictures or sound."""
    found: Any = causal.get_decoder()
    if found is not causal and found is not causal.get_output_embeddings():  # a head may be called decoder
        # within some models of images and text is a whole causal one, head and all (Llama 4)
        return decoder_of(found) if found.get_output_embeddings() is not None else found
    # some classes do not say: then the part that has the input embeddings
    embeddings = causal.get_input_embeddings()
    return next((child for child in causal.children() if any(m is embeddings for m in child.modules())), causal)


def cache_names(decoder: Any) -> list[str]:
    """Under which names it takes what it has read: keys and values (`cache` since transformers 5.24) or states."""
    accepted = inspect.signature(decoder.forward).parameters
    return [name for name in ("cache", "past_key_values", "cache_params") if name in accepted]


def last_hidden(output: Any, parts: list[Any]) -> Tensor:
    """What the head reads of a decoder's output, [..., H]. parts: the model's `before_head`, and `narrowed`."""
    hidden = output.last_hidden_state
    for part in parts:
        hidden = part(hidden)
    return hidden


def before_head(causal: PreTrainedModel) -> list[Any]:
    """What a model of text alone has between its decoder and its head, which few have (ModernBERT's decoder)."""
    if causal.config.get_text_config() is not causal.config:  # towers, and what joins them to the text
        return []
    decoder, ends = decoder_of(causal), [causal.get_output_embeddings(), causal.get_input_embeddings()]
    return [
        child for child in causal.children()
        if child is not decoder and not any(part in (decoder, *ends) for part in child.modules())
        and any(True for _ in child.parameters())
    ]  # fmt: skip


def narrowed(causal: PreTrainedModel, hidden: Tensor) -> Tensor:
    """Mamba keeps its residuals in float32, whatever format its weights have; its own forward narrows them to the head's."""
    wanted = cast(Any, causal.get_output_embeddings()).weight.dtype
    return hidden.to(wanted) if hidden.dtype == torch.float32 and wanted in (torch.bfloat16, torch.float16) else hidden
