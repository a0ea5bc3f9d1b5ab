"""Likeness of pictures by small random models, against the cosines that transformers' own classes give."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor, Dinov2Config, Dinov2Model

from posttrain.errors import UserError
from posttrain.evaluation.image_similarity import Similarity
from posttrain.models.diffusion.tiny import clip_tokenizer


def clip_and_dino(folder: Path) -> Any:
    """Small random ones in folder / clip and folder / dino; returns the processor of pictures."""
    tokenizer = clip_tokenizer()
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = small | {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = CLIPConfig(text_config=text, vision_config=small | {"image_size": 32, "patch_size": 8}, projection_dim=8)
    processor: Any = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    torch.manual_seed(0)
    clip: Any = CLIPModel(config)
    CLIPProcessor(processor, tokenizer).save_pretrained(folder / "clip")
    dino: Any = Dinov2Model(Dinov2Config(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8))
    for model in (clip, dino):  # far from the initialisation, at which all pictures are alike
        for p in model.parameters():
            p.data += 0.3 * torch.randn(p.shape)
    clip.save_pretrained(folder / "clip")
    dino.save_pretrained(folder / "dino")
    processor.save_pretrained(folder / "dino")
    return processor


def picture(seed: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 255, (32, 32, 3), dtype=np.uint8))


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / a.norm() / b.norm())


def test_they_are_mean_cosines_of_what_the_models_see(tmp_path: Path) -> None:
    processor = clip_and_dino(tmp_path)
    samples, photos = [picture(1), picture(2)], [picture(3), picture(4), picture(5)]
    found = Similarity(str(tmp_path / "clip"), str(tmp_path / "dino")).measure(samples, photos, "a sks dog")
    clip: Any = CLIPModel.from_pretrained(tmp_path / "clip").eval()
    dino: Any = Dinov2Model.from_pretrained(tmp_path / "dino").eval()
    reader: Any = CLIPProcessor.from_pretrained(tmp_path / "clip")
    words = reader(text=["a sks dog"], return_tensors="pt")
    with torch.no_grad():
        said = clip.text_projection(clip.text_model(**words).pooler_output)[0]
        seen: dict[str, list[Tensor]] = {"clip": [], "dino": []}
        for image in (*samples, *photos):
            pixels = processor(images=[image], return_tensors="pt")["pixel_values"]
            seen["clip"].append(clip.visual_projection(clip.vision_model(pixels).pooler_output)[0])
            seen["dino"].append(dino(pixels).last_hidden_state[0, 0])
    by_hand = {name: [cosine(a, b) for a in features[:2] for b in features[2:]] for name, features in seen.items()}
    assert found["clip_i"] == pytest.approx(sum(by_hand["clip"]) / 6, abs=1e-5)
    assert found["dino"] == pytest.approx(sum(by_hand["dino"]) / 6, abs=1e-5)
    assert found["clip_t"] == pytest.approx((cosine(seen["clip"][0], said) + cosine(seen["clip"][1], said)) / 2, abs=1e-5)
    assert max(by_hand["clip"]) - min(by_hand["clip"]) > 0.01 and abs(found["clip_i"] - found["clip_t"]) > 0.01


def test_a_picture_is_itself(tmp_path: Path) -> None:
    clip_and_dino(tmp_path)
    found = Similarity(str(tmp_path / "clip"), str(tmp_path / "dino")).measure([picture(1)], [picture(1)], "x")
    assert (found["clip_i"], found["dino"]) == pytest.approx((1.0, 1.0), abs=1e-5)
    assert Similarity(None, None).measure([picture(1)], [picture(2)], "x") == {}


def test_what_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"eval\.dino: .*absent cannot be loaded as such a model"):
        Similarity(None, str(tmp_path / "absent"))
