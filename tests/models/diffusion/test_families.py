"""Every family, on a tiny random pipeline of its own classes, through the one path there is."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from posttrain.batch import ImagePart
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.losses.diffusion import mixed
from posttrain.models.diffusion import image_generation
from posttrain.models.diffusion.denoiser import LORA_FILE, load_adapter, read_factors, save_adapter, save_pipeline, trained_parts
from posttrain.models.diffusion.families import (
    FAMILIES,
    DiffusionModel,
    bare,
    decode_latents,
    draw_levels,
    encode_pixels,
    encode_texts,
    from_squares,
    negative_texts,
    noising,
)
from posttrain.models.diffusion.image_generation import Drawing, draw
from posttrain.models.diffusion.pipelines import find_pipeline, load_pipeline, native_size, pipeline_directory
from posttrain.models.diffusion.tiny import TINY
from posttrain.models.quantization.nf4 import quantize_blocks

PROMPTS = ["a sks dog", "a dog"]


def pipeline(name: str) -> Any:
    return load_pipeline(find_pipeline(name, None), torch.float32)


def method(*words: str) -> Any:
    given = ["model=tiny", "data.instance_dir=x", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"]
    return typed_config(compose_run("dreambooth", [*given, *words])).peft


def part_for(pipe: Any, count: int = 2) -> tuple[ImagePart, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    mean, std = encode_pixels(pipe.vae, torch.rand(count, 3, 32, 32, generator=generator) * 2 - 1)
    noise, zero = torch.randn(mean.shape, generator=generator), torch.zeros_like(mean)
    level = torch.tensor([100, 800])[:count]
    sizes = torch.tensor([[32.0, 32, 0, 0, 32, 32]] * count)
    caption = torch.arange(count)
    part = ImagePart(mean, std, None, zero, noise, zero[:, :, :1, :1], level, caption, sizes, None, count)
    levels = noising(pipe.scheduler)
    return part, mixed(mean, noise, levels.alpha[level], levels.sigma[level])


def model_of(pipe: Any, parts: dict[str, Any] | None = None) -> DiffusionModel:
    name = FAMILIES[type(pipe).__name__].denoiser
    return DiffusionModel(pipe, PROMPTS, encode_texts(pipe, PROMPTS), parts or {name: getattr(pipe, name)}).eval()


@pytest.mark.parametrize("name", TINY)
def test_a_family_predicts_samples_and_learns(name: str) -> None:
    pipe = pipeline(name)
    model = model_of(pipe)
    part, noisy = part_for(pipe)
    with torch.no_grad():
        found = model(part, noisy)
    assert found.shape == noisy.shape and found.isfinite().all()
    swapped = ImagePart(**{**vars(part), "caption": part.caption.flip(0)})
    assert not torch.allclose(model(swapped, noisy), found, atol=1e-7)  # it hears the words
    images = draw(pipe, encode_texts(pipe, PROMPTS), negative_texts(pipe), [0, 1], Drawing(32, 32, 2, None, 2))
    alone = draw(pipe, encode_texts(pipe, PROMPTS[1:]), negative_texts(pipe), [1], Drawing(32, 32, 2, None, 1))
    assert np.abs(np.asarray(images[1], dtype=int) - np.asarray(alone[0], dtype=int)).max() <= 1
    side, step = native_size(pipeline_directory(find_pipeline(name, None)))
    assert side == 32 and step == 4


@pytest.mark.slow
def test_pictures_are_the_same_where_memory_ends_at_two(monkeypatch: pytest.MonkeyPatch) -> None:
    pipe, how, decode, sizes = (
        pipeline(next(iter(TINY))),
        Drawing(32, 32, 1, None, 3),
        image_generation.decode_latents,
        list[int](),
    )
    given = {name: value.repeat(2, *[1] * (value.ndim - 1))[:3] for name, value in encode_texts(pipe, PROMPTS).items()}
    whole = draw(pipe, given, negative_texts(pipe), [0, 1, 2], how)

    def short(vae: Any, latents: Any) -> Any:
        sizes.append(len(latents))
        if len(latents) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory (in a test)")
        return decode(vae, latents)

    monkeypatch.setattr(image_generation, "decode_latents", short)
    parts = draw(pipe, given, negative_texts(pipe), [0, 1, 2], how)
    assert sizes == [3, 1, 2]
    assert max(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() for a, b in zip(parts, whole, strict=True)) <= 1


@pytest.mark.parametrize("name", TINY)
def test_the_prediction_is_the_pipelines_own(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the denoiser is called with in training is what the pipeline calls it with in its first step of sampling."""
    pipe = pipeline(name)
    denoiser = getattr(pipe, FAMILIES[type(pipe).__name__].denoiser)
    calls: list[dict[str, Any]] = []
    forward, signature = denoiser.forward, inspect.signature(type(denoiser).forward)

    def record(*args: Any, **kwargs: Any) -> Any:
        calls.append(dict(signature.bind(denoiser, *args, **kwargs).arguments))
        return forward(*args, **kwargs)

    monkeypatch.setattr(denoiser, "forward", record)
    texts = encode_texts(pipe, PROMPTS[:1])
    draw(
        pipe, texts, negative_texts(pipe), [0], Drawing(32, 32, 2, 1.0 if not FAMILIES[type(pipe).__name__].distilled else 3.5, 1)
    )
    part, noisy = part_for(pipe, 1)
    model_of(pipe)(part, noisy)
    own, ours = calls[0], calls[-1]
    for key in ("encoder_hidden_states", "pooled_projections", "txt_ids", "img_ids", "guidance"):
        if isinstance(own.get(key), torch.Tensor):
            assert torch.allclose(own[key].float(), ours[key].float(), atol=1e-5), key
    if own.get("added_cond_kwargs"):
        for key, value in own["added_cond_kwargs"].items():
            assert torch.allclose(value, ours["added_cond_kwargs"][key], atol=1e-5), key
    data = "sample" if "sample" in own else "hidden_states"
    assert own[data].shape == ours[data].shape
    unit = 1.0 if "img_ids" in own else 1000.0  # in which this family tells the time
    assert 0.4 * unit < float(own["timestep"].float().max()) <= unit
    assert float(ours["timestep"]) == pytest.approx(float(noising(pipe.scheduler).time[100]) / 1000 * unit)


@pytest.mark.parametrize("name", TINY)
@pytest.mark.parametrize("text_encoder", [False, True])
def test_lora_starts_at_the_base_is_saved_for_diffusers_and_merges(name: str, text_encoder: bool, tmp_path: Path) -> None:
    pipe, plain = pipeline(name), pipeline(name)
    how, texts = Drawing(32, 32, 2, None, 2), encode_texts(plain, PROMPTS)
    before = draw(plain, texts, negative_texts(plain), [0, 1], how)
    torch.manual_seed(0)
    chosen = method("peft=lora", "peft.r=4")
    parts = trained_parts(pipe, chosen, text_encoder, 1, False)
    assert (len(parts) > 1) == text_encoder and not any("text_encoder_3" in part for part in parts)
    after = draw(pipe, encode_texts(pipe, PROMPTS), negative_texts(pipe), [0, 1], how)
    assert all(a.tobytes() == b.tobytes() for a, b in zip(before, after, strict=True))  # B = 0: bit for bit
    with torch.no_grad():
        for module in parts.values():
            for key, p in module.named_parameters():
                if "lora_B" in key:
                    p.copy_(torch.randn(p.shape) * 0.05)
    part, noisy = part_for(pipe)
    live = model_of(pipe)(part, noisy)
    save_adapter(parts, tmp_path / "adapter", chosen, "base")
    plain.load_lora_weights(str(tmp_path / "adapter"))
    assert torch.allclose(model_of(plain)(part, noisy), live, atol=1e-5)
    assert not torch.allclose(model_of(pipeline(name))(part, noisy), live, atol=1e-3)
    plain.fuse_lora(components=sorted(parts))
    plain.unload_lora_weights()
    base = pipeline_directory(find_pipeline(name, None))
    save_pipeline(base, {key: getattr(plain, key) for key in parts}, tmp_path / "merged")
    assert torch.allclose(model_of(pipeline(str(tmp_path / "merged")))(part, noisy), live, atol=1e-5)


@pytest.mark.parametrize("name", ["rslora", "loraplus", "pissa", "dora", "adalora", "vera"])
def test_every_adapter_method_is_read_back_as_it_was(name: str, tmp_path: Path) -> None:
    pipe = pipeline("tiny")
    small = {"adalora": ["peft.r=3", "peft.init_r=4"], "vera": ["peft.r=8"]}.get(name, ["peft.r=4"])
    chosen = method(f"peft={name}", *small)
    torch.manual_seed(0)
    parts = trained_parts(pipe, chosen, False, 10, False)
    part, noisy = part_for(pipe)
    start = model_of(pipeline("tiny"))(part, noisy)
    assert torch.allclose(model_of(pipe)(part, noisy), start, atol=1e-4)  # AdaLoRA's and VeRA's too
    with torch.no_grad():
        for key, p in parts["unet"].named_parameters():
            if p.requires_grad and ("lora_" in key or "vera_lambda_b" in key):
                p.add_(torch.randn(p.shape) * 0.05)
    live = model_of(pipe)(part, noisy)
    assert not torch.allclose(live, start, atol=1e-3)
    save_adapter(parts, tmp_path / "adapter", chosen, "base")
    again = pipeline("tiny")
    load_adapter(again, tmp_path / "adapter", "x")
    assert torch.allclose(model_of(again)(part, noisy), live, atol=2e-5)
    if name in ("dora", "vera"):
        with pytest.raises(UserError, match=r"is no sum of matrices|of dora"):
            read_factors(tmp_path / "adapter", "compose")
    else:
        assert (tmp_path / "adapter" / LORA_FILE).is_file() and read_factors(tmp_path / "adapter", "x")["unet"]


def test_nf4_blocks_carry_a_lora(tmp_path: Path) -> None:
    pipe = pipeline("tiny")
    part, noisy = part_for(pipe)
    plain = model_of(pipe)(part, noisy)
    quantize_blocks(pipe.unet, True, "float32", "cpu")
    kinds = {type(m).__name__ for m in pipe.unet.modules()}
    assert "Linear4bit" in kinds and not torch.equal(model_of(pipe)(part, noisy), plain)
    assert (model_of(pipe)(part, noisy) - plain).norm() / plain.norm() < 0.2
    parts = trained_parts(pipe, method("peft=lora", "peft.r=4"), False, 1, False)
    loss = model_of(pipe, parts)(part, noisy).square().sum()
    loss.backward()
    grads = [p.grad for k, p in parts["unet"].named_parameters() if "lora_B" in k]
    assert grads and all(g is not None for g in grads) and any(bool(g.any()) for g in grads)  # type: ignore[union-attr]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    found = []
    for recompute in (False, True):
        pipe = pipeline("tiny")
        parts = trained_parts(pipe, method(), False, 1, recompute)
        part, noisy = part_for(pipe)
        model = model_of(pipe, parts).train()
        model(part, noisy).square().sum().backward()
        assert bare(model.denoiser).is_gradient_checkpointing == recompute
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    plain, again = found
    assert plain.keys() == again.keys() and max(float(grad.abs().max()) for grad in plain.values()) > 0.01
    for name, grad in plain.items():
        assert torch.allclose(again[name], grad, atol=1e-6, rtol=1e-5), name


def test_latents_go_there_and_back_with_shift_and_scale() -> None:
    for name in ("tiny", "tiny-sd3"):
        pipe = pipeline(name)
        pixels = torch.rand(1, 3, 32, 32) * 2 - 1
        with torch.no_grad():
            raw = pipe.vae.encode(pixels).latent_dist.mean
            expected = pipe.vae.decode(raw).sample
        mean, _ = encode_pixels(pipe.vae, pixels)
        assert torch.allclose(mean, (raw - (pipe.vae.config.shift_factor or 0)) * pipe.vae.config.scaling_factor, atol=1e-6)
        assert torch.allclose(decode_latents(pipe.vae, mean), expected, atol=1e-5)


def test_squares_are_fluxs_own() -> None:
    from diffusers.pipelines.flux.pipeline_flux import FluxPipeline

    from posttrain.models.diffusion.families import _to_squares

    latents = torch.randn(2, 4, 6, 8)
    packed = FluxPipeline._pack_latents(latents, 2, 4, 6, 8)
    assert torch.equal(_to_squares(latents), packed) and torch.equal(from_squares(packed, 6, 8), latents)


def test_noise_levels_are_spread_as_they_should_be() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = draw_levels("uniform", 20000, generator, 1000).float()
    assert float(uniform.mean()) == pytest.approx(499.5, abs=6) and float(uniform.std()) == pytest.approx(288.7, abs=4)
    middle = draw_levels("logit_normal", 20000, generator, 1000).float()
    assert float((middle < 1000 / (1 + np.e)).float().mean()) == pytest.approx(0.1587, abs=0.01)  # sigmoid(-1): one deviation


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("tinny", "is no directory and not to be had from the hub"),
        ("tiny-sdx", "did you mean 'tiny-sdxl'"),
    ],
)
def test_a_name_that_is_no_pipeline(name: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_pipeline(name, None)


def test_a_model_that_is_no_pipeline(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is a model, but no diffusion pipeline \(it has no model_index.json\)"):
        find_pipeline(str(tmp_path), None)
    (tmp_path / "model_index.json").write_text('{"_class_name": "AudioLDMPipeline"}')
    with pytest.raises(UserError, match="is a AudioLDMPipeline, which cannot be trained here"):
        find_pipeline(str(tmp_path), None)
    for broken in ("{", "[]"):
        (tmp_path / "model_index.json").write_text(broken)
        with pytest.raises(UserError, match=r"model.name: .*model_index.json cannot be read"):
            find_pipeline(str(tmp_path), None)
