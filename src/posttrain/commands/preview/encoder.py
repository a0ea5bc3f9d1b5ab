"""The tokenizer that a run would use, without the model."""

from __future__ import annotations

from typing import Any

from posttrain.data.chat.encoder import Encoder, chat_template
from posttrain.data.chat.loss_weights import weighing_of
from posttrain.models.language.tokenizer import load_tokenizer, stop_tokens
from posttrain.runs.artifact import open_artifact


def encoder_of(cfg: Any) -> tuple[Encoder, Any]:
    """With its tokenizer. Raises UserError as the run itself would."""
    model, revision = cfg.model, cfg.model.revision
    tokenizer_at = source = model.name
    if cfg.init:
        start = open_artifact(cfg.init, "init")
        tokenizer_at, source = start.tokenizer, start.source
    template = chat_template(model.chat_template) if model.chat_template else None
    tokenizer = load_tokenizer(tokenizer_at, revision, model.trust_remote_code, template)
    return Encoder(tokenizer, stop_tokens(source, revision, tokenizer), weighing_of(cfg)), tokenizer
