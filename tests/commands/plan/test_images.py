"""The plan of a DreamBooth run against what a real pipeline really holds and keeps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from posttrain.batch import ImagePart
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.models.diffusion.denoiser import trained_parts
from posttrain.models.diffusion.families import DiffusionModel, encode_texts
from posttrain.models.diffusion.pipelines import find_pipeline, load_pipeline

pytestmark = pytest.mark.slow


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (40, 40), (50 * i, 0, 0)).save(folder / f"{i}.png")
    return folder


def words(photos: Path, name: str) -> list[str]:
    prompts = ["data.instance_prompt=a sks dog", "data.class_prompt=a dog"]
    return ["model=tiny", f"model.name={name}", f"data.instance_dir={photos}", *prompts, "train.batch_size=2"]


def really(asked: list[str], images: int) -> tuple[dict[str, int], int]:
    """Bytes of weights, gradients and moments, and of what one forward pass over `images` pictures keeps."""
    cfg: Any = typed_config(compose_run("dreambooth", asked))
    pipe = load_pipeline(find_pipeline(cfg.model.name, None), torch.float32)
    parts = trained_parts(pipe, cfg.peft, False, 10, cfg.train.gradient_checkpointing is True)
    with torch.no_grad():
        model = DiffusionModel(pipe, ["a sks dog"], encode_texts(pipe, ["a sks dog"]), parts)
    model.train()
    noise, number = torch.randn(images, pipe.vae.config.latent_channels, 16, 16), torch.zeros(images, dtype=torch.int64)
    part = ImagePart(noise, noise, None, noise, noise, noise, number, number, torch.zeros(images, 6), None, images)
    kept: dict[int, Any] = {}

    def keep(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, nn.Parameter):
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(part, noise).sum()
    loss.backward()
    trained = [p for p in model.parameters() if p.requires_grad]
    sizes = {"gradients": sum(p.nbytes for p in trained), "optimizer": 2 * sum(p.nbytes for p in trained)}
    sizes["autoencoder"] = sum(p.nbytes for p in pipe.vae.parameters())
    adapters = sum(p.nbytes for name, p in model.named_parameters() if "lora_" in name)
    sizes |= {"weights": sum(p.nbytes for p in model.parameters()) - adapters} | ({"adapters": adapters} if adapters else {})
    return sizes, sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize("name", ["tiny", "tiny-sdxl", "tiny-sd3", "tiny-flux"])
@pytest.mark.parametrize("method", [[], ["+peft=lora", "model.dtype=float32"]])
def test_what_can_be_counted_is_exact(photos: Path, name: str, method: list[str]) -> None:
    asked = [*words(photos, name), *method]
    plan = make_plan("dreambooth", asked)
    expected, kept = really(asked, 4)  # two of the individual, and as many of its class
    assert {part: plan["memory"][part] for part in expected} == expected
    assert plan["memory"]["activations"] == pytest.approx(kept, rel=0.05)
    recomputed, less = really([*asked, "train.gradient_checkpointing=true"], 4)
    assert plan["memory_with_recomputation"] == pytest.approx(sum(recomputed.values()) + less, rel=0.05)


@pytest.mark.slow
def test_a_plan_says_what_would_fit(photos: Path) -> None:
    asked = words(photos, "tiny")
    plan = make_plan("dreambooth", [*asked, "train.max_steps=7"])
    assert (plan["steps"], plan["micro_batch_images"], plan["images"]) == (7, 4, 28)
    least = make_plan("dreambooth", [*asked, "train.max_steps=7"], plan["total_bytes"] - 1)
    assert not least["fits"] and all(change["fits"] for change in least["changes"])
    assert "train.gradient_checkpointing=true" in [change["override"] for change in least["changes"]]


def test_no_prior_is_half_the_pictures_and_less_time(photos: Path) -> None:
    asked = words(photos, "tiny")
    with_prior, without = make_plan("dreambooth", asked), make_plan("dreambooth", [*asked, "prior.weight=0"])
    assert with_prior["images"] == 2 * without["images"] and with_prior["flops"] > 2 * without["flops"]
    assert with_prior["memory"]["activations"] == pytest.approx(2 * without["memory"]["activations"], rel=0.05)
