"""All pictures of a DreamBooth run: those of the individual, of its class, and those that drift is measured on."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.console import Meter
from posttrain.data.collate import BatchSampler
from posttrain.data.images.folder import FoundImage, Framing, View, fingerprint, views_of
from posttrain.data.images.latents import Masks, Pictures, load_latents, load_masks
from posttrain.models.diffusion.families import FAMILIES, Family, Texts, encode_pixels, encode_texts, latent_scale, negative_texts
from posttrain.models.diffusion.image_generation import Drawing
from posttrain.models.diffusion.pipelines import load_pipeline
from posttrain.runs.cache_place import cache_root
from posttrain.runs.identity import content_hash
from posttrain.stages.dreambooth.class_images import class_images
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.prepare import ImageData

HELD_OUT = 1_000_000  # seeds of pictures that drift is measured on lie so far above those that are trained on


@dataclass(frozen=True)
class DreamboothDataset:
    """The pipeline and every picture, with latents and text embeddings where those are cached.

    instance, prior: what is trained on; probes: name -> what drift is measured on. captions: all prompts there are; texts: their
    embeddings, with `negative` the one that guidance leads away from. prior_order: draws of the prior; None without one.
    """

    cfg: Dreambooth
    inputs: ImageData
    pipe: Any
    family: Family
    dtype: torch.dtype
    captions: list[str]
    texts: Texts
    negative: Texts
    instance: Pictures
    prior: Pictures
    probes: dict[str, Pictures]
    prior_order: BatchSampler | None

    def numbers(self, prompts: list[str]) -> list[int]:
        """Of prompts, among the captions."""
        return [self.captions.index(prompt) for prompt in prompts]

    def prompts(self) -> list[tuple[str, str]]:
        """The prompts that are drawn at every evaluation, with their kinds."""
        return prompts_of(self.cfg, self.inputs)


def prompts_of(cfg: Dreambooth, inputs: ImageData) -> list[tuple[str, str]]:
    """(kind, prompt) of what samples are drawn of."""
    data, sample = cfg.data, cfg.sample
    found = [("instance", data.instance_prompt or inputs.views[0].caption)]
    found += [("class", data.class_prompt)] if data.class_prompt else []
    return found + [("unrelated", text) for text in sample.unrelated] + [("more", text) for text in sample.prompts]


def fill_dataset(cfg: Dreambooth, inputs: ImageData, device: torch.device, check: Callable[[], None]) -> DreamboothDataset:
    """Load the pipeline; make the class images that are not there yet; encode everything. check: may raise Stopped."""
    dtype: torch.dtype = getattr(torch, cfg.base_dtype)
    pipe = load_pipeline(inputs.base, dtype)
    family = FAMILIES[type(pipe).__name__]
    if cfg.quant.is_quantized:
        cfg.quant.quantize_blocks(getattr(pipe, family.denoiser), str(device))
    pipe.to(device)
    maker = _Maker(cfg, inputs, pipe, content_hash(inputs.base.digest, str(dtype), cfg.quant.model_dump()), check)
    prior = maker.prior_views()
    probes = maker.probe_views()
    everything = [*inputs.views, *prior, *(view for views in probes.values() for view in views)]
    captions = list(dict.fromkeys([view.caption for view in everything] + [text for _, text in prompts_of(cfg, inputs)]))
    texts, negative = encode_texts(pipe, captions), negative_texts(pipe)
    encoder = _Encoder(cfg, inputs, pipe, device, captions, check)
    order = inputs.order
    prior_order = None
    if prior:
        prior_order = BatchSampler.shuffled(
            len(prior), order.batch_size, order.grad_accum, order.world_size, cfg.train.seed + 1, len(order.drawn)
        )
    return DreamboothDataset(
        cfg=cfg,
        inputs=inputs,
        pipe=pipe,
        family=family,
        dtype=dtype,
        captions=captions,
        texts=texts,
        negative=negative,
        instance=encoder.pictures(inputs.views, cfg.data.mask),
        prior=encoder.pictures(prior, None),
        probes={name: encoder.pictures(views, None) for name, views in probes.items()},
        prior_order=prior_order,
    )


@dataclass(frozen=True)
class _Maker:
    """Pictures by the frozen model. identity: names it, its precision included."""

    cfg: Dreambooth
    inputs: ImageData
    pipe: Any
    identity: str
    check: Callable[[], None]

    def prior_views(self) -> list[View]:
        cfg = self.cfg
        if cfg.prior.weight > 0 and not self.inputs.class_views:
            return self._made(str(cfg.data.class_prompt), cfg.prior.images, cfg.train.seed, "class")
        return self.inputs.class_views

    def probe_views(self) -> dict[str, list[View]]:
        cfg, found = self.cfg, {}
        if not cfg.eval.images:
            return {}
        seed = cfg.train.seed + HELD_OUT
        if cfg.data.class_prompt:
            found["class"] = self._made(cfg.data.class_prompt, cfg.eval.images, seed, "held-out class")
        share = math.ceil(cfg.eval.images / max(1, len(cfg.sample.unrelated)))
        unrelated = [view for text in cfg.sample.unrelated for view in self._made(text, share, seed, "unrelated")]
        return found | ({"unrelated": unrelated} if unrelated else {})

    def _made(self, prompt: str, count: int, seed: int, name: str) -> list[View]:
        prior, side = self.cfg.prior, self.inputs.framing.side
        how = Drawing(side, side, prior.inference_steps, prior.guidance, prior.batch_size)
        files = class_images(self.pipe, self.identity, prompt, count, seed, how, self.check, name)
        framing = Framing(how.width, self.inputs.framing.step, False, 1, self.cfg.data.flip and name == "class")
        return [view for file in files for view in views_of(FoundImage(file, (how.width, how.height)), prompt, framing)]


@dataclass(frozen=True)
class _Encoder:
    """Views -> pictures, with latents where those are cached."""

    cfg: Dreambooth
    inputs: ImageData
    pipe: Any
    device: torch.device
    captions: list[str]
    check: Callable[[], None]

    def pictures(self, views: list[View], mask: str | None) -> Pictures:
        scale = latent_scale(self.pipe)
        latents = self._latents(views) if self.cfg.data.cache and views else None
        masks = None
        if mask:
            folder = None if mask == "alpha" else Path(mask).expanduser()
            masks = load_masks(views, Masks(folder), self.inputs.background, scale)
        numbers = [self.captions.index(view.caption) for view in views]
        return Pictures(views, numbers, self.inputs.background, scale, self.pipe.vae.config.latent_channels, latents, masks)

    def _latents(self, views: list[View]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        key = content_hash(self.inputs.base.digest, fingerprint(views), self.inputs.background, str(self.device))
        path = cache_root() / "latents" / f"{key}.safetensors"
        with Meter("latents", len(views)) as meter:

            def advance() -> None:
                meter.advance()
                self.check()

            return load_latents(views, path, self.inputs.background, lambda x: encode_pixels(self.pipe.vae, x), advance)
