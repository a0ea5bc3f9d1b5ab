"""Causal language models of transformers, from files to memory."""

from __future__ import annotations

from typing import Any, Literal

import torch
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.utils import logging

from posttrain.errors import UserError
from posttrain.models.language.architecture import config_of, model_class
from posttrain.models.language.completeness import Gaps
from posttrain.models.language.tokenizer import first_line, trusted
from posttrain.models.quantization import keep_as_quantized
from posttrain.runs.artifact import is_classifier


def load_causal(
    name: str, revision: str | None, dtype: str, device: str, trust_remote_code: bool, quantization: BitsAndBytesConfig | None,
    unexpected: Literal["refuse", "say"] = "refuse",
) -> PreTrainedModel:  # fmt: skip
    """Model on `device`, all weights trainable unless quantized; UserError naming the field for what cannot be loaded, and where
    not all weights are in the files.

    dtype: float32 | bfloat16 | float16. unexpected: what becomes of tensors that the model has no place for.
    """
    logging.disable_progress_bar()
    source = trusted(name, revision, trust_remote_code, weights=True)
    before = logging.get_verbosity()
    logging.set_verbosity_error()  # what is not as it should be is an error of ours
    try:
        loaded: Any = model_class(config_of(source.directory, trust_remote_code)).from_pretrained(
            source.directory, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code, use_safetensors=True,
            quantization_config=quantization, device_map={"": device}, output_loading_info=True, ignore_mismatched_sizes=True,
        )  # fmt: skip
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise UserError(f"model.name: '{name}' cannot be loaded as a causal language model ({first_line(error)})") from error
    finally:
        logging.set_verbosity(before)
    model, info = loaded
    Gaps.of(model, info, is_classifier(source.directory)).check(name, unexpected)
    keep_as_quantized(model)
    # a pad token that is also an end token would otherwise get no gradient in the embedding
    embedding: Any = model.get_input_embeddings()
    if hasattr(embedding, "padding_idx"):
        embedding.padding_idx = None
    return model
