"""NEFTune (Jain et al. 2023, arXiv 2310.05914): noise on the embeddings of what is trained on."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from posttrain.batch import Segment
from posttrain.errors import UserError


def noisy(embeddings: Tensor, segments: tuple[Segment, ...], alpha: float) -> Tensor:
    """Embeddings [T, H] with uniform noise in +-alpha / sqrt(L H), L the tokens of each document. Without alpha as they are."""
    if not alpha:
        return embeddings
    lengths = torch.cat([torch.full((s.stop - s.start,), float(s.stop - s.start)) for s in segments]).to(embeddings.device)
    most = alpha / torch.sqrt(lengths * embeddings.shape[1])[:, None]
    return embeddings + (torch.empty_like(embeddings, dtype=torch.float32).uniform_(-1, 1) * most).to(embeddings.dtype)


def check_noise(model: Any) -> None:
    """Raises UserError for a model whose layers have embeddings of their own, which read tokens."""
    if getattr(model.config.get_text_config(), "vocab_size_per_layer_input", None):
        raise UserError(
            f"sft.neftune_noise_alpha: {type(model).__name__} has an embedding for its layers too, which no noise reaches; say "
            f"sft.neftune_noise_alpha=null"
        )
