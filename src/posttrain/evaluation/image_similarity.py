"""How similar samples are to the individual and to their prompt, by models that the user names (Ruiz et al. 2022, section
4.1)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from posttrain.errors import UserError


class Loaded(NamedTuple):
    model: Any
    processor: Any


class Similarity:
    """clip, dino: hub ids or directories, or None. Raises UserError, naming eval.clip or eval.dino, for what cannot be loaded."""

    def __init__(self, clip: str | None, dino: str | None) -> None:
        self.clip = _load(clip, "clip") if clip else None
        self.dino = _load(dino, "dino") if dino else None

    @torch.no_grad()
    def measure(self, samples: Sequence[Any], photos: Sequence[Any], prompt: str) -> dict[str, float]:
        """Mean cosines. samples, photos: PIL images; clip_i and dino of every pair of both, clip_t of samples and prompt."""
        found = {}
        if self.clip:
            seen = _clip_images(self.clip, samples)
            found["clip_i"] = float((seen @ _clip_images(self.clip, photos).T).mean())
            found["clip_t"] = float((seen @ _clip_text(self.clip, prompt).T).mean())
        if self.dino:
            found["dino"] = float((_dino_images(self.dino, samples) @ _dino_images(self.dino, photos).T).mean())
        return found


def _clip_images(clip: Loaded, images: Sequence[Any]) -> Tensor:
    return _unit(clip.model.get_image_features(**clip.processor(images=list(images), return_tensors="pt")))


def _clip_text(clip: Loaded, prompt: str) -> Tensor:
    return _unit(clip.model.get_text_features(**clip.processor(text=[prompt], return_tensors="pt", truncation=True)))


def _dino_images(dino: Loaded, images: Sequence[Any]) -> Tensor:
    """By the class token of the last layer."""
    return _unit(dino.model(**dino.processor(images=list(images), return_tensors="pt")).last_hidden_state[:, 0])


def _unit(found: Any) -> Tensor:
    features = found if isinstance(found, Tensor) else found.pooler_output
    return torch.nn.functional.normalize(features.float(), dim=-1)


def _load(name: str, key: str) -> Loaded:
    from transformers import AutoImageProcessor, AutoModel, CLIPModel, CLIPProcessor

    try:
        if key == "clip":
            return Loaded(CLIPModel.from_pretrained(name, use_safetensors=True).eval(), CLIPProcessor.from_pretrained(name))
        return Loaded(AutoModel.from_pretrained(name, use_safetensors=True).eval(), AutoImageProcessor.from_pretrained(name))
    except Exception as error:  # the hub's client and transformers have no common class for theirs
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"eval.{key}: {name} cannot be loaded as such a model ({reason})") from error
