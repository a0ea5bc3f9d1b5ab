"""What a DreamBooth run will cost in memory and time: its pipeline really runs, on the meta device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import sdpa_backward_flop_count, sdpa_flop_count

from posttrain.batch import ImagePart
from posttrain.commands.plan.memory import tally
from posttrain.devices.device import Device
from posttrain.models.diffusion.denoiser import trained_parts
from posttrain.models.diffusion.families import DiffusionModel, Texts, bare, encode_texts, latent_scale, text_encoders
from posttrain.models.diffusion.pipelines import pipeline_directory, shapes_of_pipeline
from posttrain.models.language.work import Cost, Work, cost, flops
from posttrain.models.quantization import blocks_linears
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.prepare import ImageData, read_images

aten = torch.ops.aten
ATTENTION = {
    aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
    aten._scaled_dot_product_flash_attention_for_cpu_backward: lambda out, q, k, v, *_, **__: sdpa_backward_flop_count(
        out, q, k, v
    ),
}  # the counter knows those of a GPU only


def image_plan(cfg: Dreambooth, device: Device) -> dict[str, Any]:
    """As `make_plan`, but for seconds: `flops` are of the whole run.

    Raises UserError as the run itself would: pictures and prompts are read, weights are not.
    """
    inputs, preserved = read_images(cfg, cfg.train.processes, weights=False), cfg.prior.weight > 0
    plain, recomputed = (_micro_batch(cfg, inputs, recompute, device) for recompute in (False, True))
    kept = recomputed.kept if cfg.train.gradient_checkpointing is True else plain.kept
    fixed, steps = sum(plain.parts.values()), inputs.order.num_steps
    total = max(fixed + kept, plain.everything)
    made = cfg.prior.images if preserved and not cfg.data.class_dir else 0
    drawing = plain.flops / 3 / plain.images * made * cfg.prior.inference_steps * 2  # a forward pass; guidance doubles it
    return {
        "stage": cfg.stage,
        "model": cfg.model.name,
        "method": cfg.peft.name,
        "quant": cfg.quant.name,
        "total_parameters": plain.total,
        "trained_parameters": plain.trained,
        "memory": {part: round(size) for part, size in (plain.parts | {"activations": kept}).items() if size},
        "memory_with_recomputation": round(max(fixed + recomputed.kept, plain.everything)),
        "memory_without_recomputation": round(max(fixed + plain.kept, plain.everything)),
        "total_bytes": round(total),
        "fits": total <= device.capacity,
        "micro_batch_images": plain.images,
        "image_side": inputs.framing.side,
        "steps": steps,
        "images": plain.images * cfg.train.grad_accum * cfg.train.processes * steps,
        "flops": plain.flops * cfg.train.grad_accum * steps + drawing,
        "assumptions": [
            "attention is counted as keeping no matrix of weights; a framework's own workspace is not in it",
            f"before training the whole pipeline makes and encodes pictures: {plain.everything / 1e9:.3f} GB of weights",
            f"time is of the steps and of {made} class images; samples and measurements on the way come on top",
        ],
    }


class _Counted(NamedTuple):
    """Bytes: parts, of what lies there while it trains; everything, of the pipeline's weights before; kept, of a micro-batch's
    forward pass for its backward. flops: of both passes over `images` pictures."""

    parts: dict[str, float]
    everything: float
    kept: float
    flops: float
    images: int
    total: int
    trained: int


def _micro_batch(cfg: Dreambooth, inputs: ImageData, recompute: bool, device: Device) -> _Counted:
    """One micro-batch, the prior's pictures in it, forward and backward."""
    pipe = shapes_of_pipeline(pipeline_directory(inputs.base), getattr(torch, cfg.base_dtype))
    encoders = text_encoders(pipe)
    everything = sum(map(_bytes, [*encoders.values(), pipe.vae]))
    images = cfg.train.batch_size * (2 if cfg.prior.weight > 0 else 1)
    caption, text = str(cfg.data.instance_prompt or cfg.data.class_prompt or "a picture"), cfg.dreambooth.text_encoder
    with torch.device("meta"), warnings.catch_warnings(action="ignore"):
        parts = trained_parts(pipe, cfg.peft, text, 1000, recompute)
        texts, read = _cost(lambda: encode_texts(pipe, [caption] * images))
        model = DiffusionModel(pipe, [caption], texts, parts)
    found = tally(cfg, device, model, model, [module.weight for module in blocks_linears(bare(model.denoiser)).values()])
    drawn = _denoised(model, texts, images, inputs.framing.side // latent_scale(pipe))
    used = not cfg.data.cache or text
    frozen = sum(_bytes(encoder) for name, encoder in encoders.items() if name not in model.trained) if used else 0.0
    lying = found.parts | {"autoencoder": _bytes(pipe.vae), "text encoders": frozen}
    everything += sum(found.parts[part] for part in ("weights", "quantized weights", "quantization constants"))
    work: Work = drawn.forward + drawn.backward + (read.forward + read.backward) * used
    return _Counted(lying, everything, drawn.kept + read.kept * used, flops(work), images, found.total, found.trained)


def _denoised(model: DiffusionModel, texts: Texts, images: int, side: int) -> Cost:
    """What the denoiser costs. As fake tensors of a CPU, whose attention keeps what a GPU's does: queries, keys, values and
    outputs; on the meta device it would keep a matrix of weights."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        model.denoiser.to_empty(device="cpu")
        model.texts = {name: torch.zeros(value.shape, dtype=value.dtype) for name, value in texts.items()}
        latents = torch.zeros(images, model.pipe.vae.config.latent_channels, side, side)
        number, sizes = torch.arange(images), torch.zeros(images, 6)
        part = ImagePart(latents, latents, None, latents, latents, latents[..., :1, :1], number, number, sizes, None, images)
        model.train()
        return _cost(lambda: {"predicted": model(part, latents)})[1]


def _cost(forward: Callable[[], Texts]) -> tuple[Texts, Cost]:
    return cost(forward, lambda found: list(found.values()), operations=ATTENTION)


def _bytes(module: Any) -> float:
    return float(sum(p.numel() * p.element_size() for p in module.parameters()))
