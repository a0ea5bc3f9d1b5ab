"""The tokenizer that a run would use, without the model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import weighing_of
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder
from posttrain.runs.directory import read_manifest


def encoder_of(cfg: Any) -> tuple[Encoder, Any]:
    """With its tokenizer. Raises UserError as the run itself would."""
    model, source = cfg.model, cfg.init or cfg.model.name
    tokenizer_at, revision = source, model.revision
    directory = Path(source).expanduser()
    if (directory / "manifest.json").exists():
        manifest = read_manifest(directory)
        tokenizer_at = str(directory / manifest["weights"]["path"])
        source = tokenizer_at if manifest["weights"]["kind"] == "model" else manifest["base"]["path"]
    tokenizer = load_tokenizer(tokenizer_at, revision, model.trust_remote_code, model.chat_template)
    return make_encoder(tokenizer, source, revision, weighing_of(cfg)), tokenizer
