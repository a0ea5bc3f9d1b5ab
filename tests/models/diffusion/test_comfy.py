"""LoRAs under ComfyUI's names: diffusers' own reader finds the same change in them, and the same noise is predicted."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from tests.models.diffusion.test_families import model_of, part_for, pipeline
from tests.models.peft.plain import plain_lora

from posttrain.errors import RunError, UserError
from posttrain.models.diffusion.comfy import comfy_tensors, write_comfy
from posttrain.models.diffusion.denoiser import load_adapter, read_factors, save_adapter, trained_parts
from posttrain.models.peft.factors import Factors


class Trained(NamedTuple):
    name: str
    kind: str
    adapter: Path


OTHERS = [pytest.param(name, marks=pytest.mark.slow) for name in ("tiny-sdxl", "tiny-sd3", "tiny-flux")]


@pytest.fixture(scope="module", params=["tiny", *OTHERS])
def trained(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """A LoRA of random numbers on denoiser and text encoders, as a run leaves it."""
    folder = tmp_path_factory.mktemp("comfy") / "adapter"
    pipe, method = pipeline(request.param), plain_lora(r=2, alpha=6.0)
    parts = trained_parts(pipe, method, True, 1, False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for value in (v for part in parts.values() for n, v in part.named_parameters() if "lora_B" in n):
            value.copy_(torch.randn(value.shape, generator=generator) * 0.1)
    save_adapter(parts, folder, method, "base")
    return Trained(request.param, type(pipe).__name__, folder)


@torch.no_grad()
def predicted(pipe: Any) -> torch.Tensor:
    return model_of(pipe)(*part_for(pipe))


def test_diffusers_reads_the_same_model(trained: Trained, tmp_path: Path) -> None:
    write_comfy(trained.kind, read_factors(trained.adapter, "run"), tmp_path / "mine.safetensors", torch.float32, {})
    ours, theirs, bare = (pipeline(trained.name) for _ in range(3))
    load_adapter(ours, trained.adapter, "run")
    theirs.load_lora_weights(str(tmp_path), weight_name="mine.safetensors", adapter_name="run")
    live = predicted(ours)
    assert (live - predicted(bare)).norm() > 0.01 * live.norm()
    torch.testing.assert_close(predicted(theirs), live, rtol=0, atol=2e-6)
    for part in ("unet", "transformer", "text_encoder", "text_encoder_2"):
        if getattr(ours, part, None) is not None:
            mine, found = (changes(getattr(pipe, part)) for pipe in (ours, theirs))
            assert mine.keys() == found.keys()
            for layer, change in mine.items():
                torch.testing.assert_close(found[layer], change, rtol=0, atol=1e-6)


def changes(part: Any) -> dict[str, torch.Tensor]:
    found = {n: m for n, m in part.named_modules() if "run" in getattr(m, "lora_A", {})}
    return {n: m.lora_B["run"].weight @ m.lora_A["run"].weight * m.scaling["run"] for n, m in found.items()}


def test_names_by_hand() -> None:
    one = Factors(torch.ones(2, 3), torch.ones(4, 2))
    layer = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    parts = {"unet": {layer: one}, "text_encoder": {"encoder.layers.0.mlp.fc1": one}}
    found = comfy_tensors("StableDiffusionPipeline", parts, torch.float16)
    stem = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out_0"
    assert {name: tuple(value.shape) for name, value in found.items() if "unet" in name} == {
        f"{stem}.lora_down.weight": (2, 3), f"{stem}.lora_up.weight": (4, 2), f"{stem}.alpha": ()
    }  # fmt: skip
    assert found[f"{stem}.alpha"].item() == 2 and found[f"{stem}.lora_up.weight"].dtype == torch.float16
    assert "lora_te_text_model_encoder_layers_0_mlp_fc1.lora_up.weight" in found
    parts = {"text_encoder": {"encoder.a": one}, "text_encoder_2": {"text_model.encoder.a": one, "text_projection": one}}
    names = {name.split(".")[0] for name in comfy_tensors("StableDiffusionXLPipeline", parts, torch.float32)}
    assert names == {"lora_te1_text_model_encoder_a", "lora_te2_text_model_encoder_a", "lora_te2_text_projection"}
    with pytest.raises(UserError, match="no name for a LoRA of vae"):
        comfy_tensors("StableDiffusionPipeline", {"vae": {"x": one}}, torch.float32)


def test_what_a_reader_would_not_take_is_not_written(tmp_path: Path) -> None:
    one = {"unet": {"x": Factors(torch.ones(2, 3), torch.ones(4, 2))}}
    write_comfy("StableDiffusionPipeline", one, tmp_path / "a.safetensors", torch.float32, {"who": "me"})
    assert len(load_file(tmp_path / "a.safetensors")) == 3
    alike = {"unet": {"a.b": one["unet"]["x"], "a_b": one["unet"]["x"]}}
    with pytest.raises(RunError, match="diffusers' reader finds 2 of its 4 matrices"):
        write_comfy("StableDiffusionPipeline", alike, tmp_path / "b.safetensors", torch.float32, {})
