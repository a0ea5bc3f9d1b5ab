"""All pictures of a DreamBooth run: those of the individual, of its class, and those that drift is measured on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import ImageColor

from posttrain.config.schema import Dreambooth
from posttrain.console import Meter, say
from posttrain.data.collate import BatchSampler
from posttrain.data.images.captions import captions_of, check_token
from posttrain.data.images.folder import FoundImage, Framing, View, find_images, fingerprint, views_of
from posttrain.data.images.latents import Masks, Pictures, load_latents, load_masks
from posttrain.errors import UserError
from posttrain.models.diffusion.families import FAMILIES, encode_pixels, encode_texts, latent_scale, negative_texts
from posttrain.models.diffusion.image_generation import Drawing
from posttrain.models.diffusion.pipelines import find_pipeline, load_pipeline, native_size, pipeline_directory
from posttrain.models.hub import BaseInfo
from posttrain.models.quantization import quantize_blocks
from posttrain.runs.artifact import open_artifact
from posttrain.runs.cache import cache_root
from posttrain.runs.directory import Run
from posttrain.runs.manifest import Parent
from posttrain.stages.dreambooth.class_images import class_images
from posttrain.stages.stage import content_hash
from posttrain.training.signals import StopSignal

HELD_OUT = 1_000_000  # seeds of pictures that drift is measured on lie so far above those that are trained on


@dataclass(frozen=True)
class ImageInputs:
    """All that is read before a weight is loaded. left_out: a line for each picture that cannot be read. upscaled: how many are
    smaller than what is made of them."""

    base: BaseInfo
    parents: list[Parent]
    framing: Framing
    background: tuple[int, int, int]
    instance: list[FoundImage]
    views: list[View]
    class_views: list[View]
    token: str | None
    left_out: list[str]
    order: BatchSampler
    key: str

    @property
    def upscaled(self) -> int:
        return len({view.path for view in self.views if view.original < (view.width, view.height)})


def read_images(cfg: Dreambooth, world_size: int, weights: bool = True) -> ImageInputs:
    """weights: whether the model's will be wanted, and are fetched.

    Raises UserError for anything wrong with model, pictures or words.
    """
    data, train = cfg.data, cfg.train
    base, parents = _start(cfg, weights)
    side, step = native_size(pipeline_directory(base))
    framing = Framing(data.size or side, step, data.buckets, data.crops, data.flip)
    if framing.side % step:
        near = max(step, framing.side // step * step)
        raise UserError(f"data.size: {framing.side} is no multiple of {step}, as this model needs it; say data.size={near}")
    try:
        red, green, blue = ImageColor.getrgb(data.background)[:3]
    except ValueError:
        raise UserError(f"data.background: '{data.background}' is no colour; write white, black or '#rrggbb'") from None
    assert data.instance_dir
    instance, left_out = find_images(Path(data.instance_dir).expanduser(), "data.instance_dir", data.corrupt)
    captions = captions_of([found.path for found in instance], data.captions, data.instance_prompt)
    token = check_token(captions, data.class_prompt, data.token)
    views = [view for found, text in zip(instance, captions, strict=True) for view in views_of(found, text, framing)]
    class_views: list[View] = []
    if cfg.prior.weight > 0 and data.class_dir:
        found, more = find_images(Path(data.class_dir).expanduser(), "data.class_dir", data.corrupt)
        left_out += more
        class_views = [view for each in found for view in views_of(each, str(data.class_prompt), framing)]
    if data.mask and data.mask != "alpha":
        _check_masks(Path(data.mask).expanduser(), instance)
    per_step = train.batch_size * train.grad_accum * world_size
    total = train.max_steps * per_step if train.max_steps else math.ceil(train.epochs * len(views))
    order = BatchSampler.shuffled(len(views), train.batch_size, train.grad_accum, world_size, train.seed, total)
    key = content_hash(fingerprint(views), fingerprint(class_views))
    return ImageInputs(
        base, parents, framing, (red, green, blue), instance, views, class_views, token, left_out, order, key
    )  # fmt: skip


def _start(cfg: Dreambooth, weights: bool) -> tuple[BaseInfo, list[Parent]]:
    """The pipeline to begin with: the model's own, or what a finished run in full has left."""
    if cfg.init is None:
        return find_pipeline(cfg.model.name, cfg.model.revision, weights), []
    artifact = open_artifact(cfg.init, "init")
    if artifact.kind == "adapter":
        raise UserError(
            f"init: {cfg.init} is an adapter; merge it first (posttrain merge {cfg.init} --out DIR) and say init=DIR, or train "
            "another on the same base and put both together with posttrain compose"
        )
    return find_pipeline(artifact.source, None, weights), artifact.parents("init")


def _check_masks(folder: Path, instance: list[FoundImage]) -> None:
    if not folder.is_dir():
        raise UserError(f"data.mask: {folder} is no folder; give one with a mask for each picture, or say data.mask=alpha")
    there = {path.stem for path in folder.iterdir()}
    if missing := [found.path.name for found in instance if found.path.stem not in there]:
        raise UserError(f"data.mask: {folder} has no mask for {missing[0]} (and {len(missing) - 1} more)")


def announce(cfg: Dreambooth, run: Run, inputs: ImageInputs) -> None:
    """What is about to happen, in the user's words: model, pictures, and what became of them."""
    data, order = cfg.data, inputs.order
    say(f"model {inputs.base.name}")
    token = f", token '{inputs.token}'" if inputs.token else ""
    size = f"{inputs.framing.side}x{inputs.framing.side}" + (" in area" if data.buckets else "")
    say(f"data {data.instance_dir}: {len(inputs.instance)} pictures, {len(inputs.views)} views of {size}{token}")
    for line in inputs.left_out:
        say(f"  left out: {line}")
    if inputs.upscaled:
        say(f"  {inputs.upscaled} are smaller than that and are enlarged")
    if cfg.prior.weight > 0:
        count = len({view.path for view in inputs.class_views}) or cfg.prior.images
        origin = f"of {data.class_dir}" if data.class_dir else "from the frozen model"
        say(f"prior '{data.class_prompt}': {count} class images {origin}, weight {cfg.prior.weight:g}")
    else:
        say("no prior preservation (prior.weight=0): the class may drift to the individual")
    both = " and as many of the prior" if cfg.prior.weight > 0 else ""
    say(f"{order.num_steps} steps of {order.units_per_step} pictures of the individual{both} -> {run.dir}")


class DreamboothDataset:
    """The pipeline and every picture, with latents and text embeddings where those are cached.

    instance, prior: what is trained on; probes: name -> what drift is measured on. captions: all prompts there are; texts: their
    embeddings, with `negative` the one that guidance leads away from.
    """

    def __init__(self, cfg: Dreambooth, inputs: ImageInputs, device: torch.device, stop: StopSignal) -> None:
        self.cfg, self.inputs, self.device, self.stop = cfg, inputs, device, stop
        self.prior_order: BatchSampler | None = None

    def fill(self) -> None:
        """Load the pipeline; make the class images that are not there yet; encode everything."""
        cfg, inputs = self.cfg, self.inputs
        self.dtype: torch.dtype = getattr(torch, cfg.base_dtype)
        pipe = self.pipe = load_pipeline(inputs.base, self.dtype)
        self.family = FAMILIES[type(pipe).__name__]
        if cfg.quant.method != "none":
            quantize_blocks(getattr(pipe, self.family.denoiser), cfg.quant.model_dump(), str(self.device))
        pipe.to(self.device)
        self.identity = content_hash(inputs.base.digest, str(self.dtype), cfg.quant.model_dump())
        side = inputs.framing.side
        how = Drawing(side, side, cfg.prior.inference_steps, cfg.prior.guidance, cfg.prior.batch_size)
        prior = inputs.class_views
        if cfg.prior.weight > 0 and not prior:
            prior = self._made(str(cfg.data.class_prompt), cfg.prior.images, cfg.train.seed, how, "class")
        probes = self._probe_views(how)
        shown = self.prompts()
        everything = [*inputs.views, *prior, *(view for views in probes.values() for view in views)]
        self.captions = list(dict.fromkeys([view.caption for view in everything] + [text for _, text in shown]))
        self.texts, self.negative = encode_texts(pipe, self.captions), negative_texts(pipe)
        self.instance = self._pictures(inputs.views, cfg.data.mask)
        self.prior = self._pictures(prior, None)
        self.probes = {name: self._pictures(views, None) for name, views in probes.items()}
        if prior:
            self.prior_order = BatchSampler.shuffled(
                len(prior), inputs.order.batch_size, inputs.order.grad_accum, inputs.order.world_size, cfg.train.seed + 1,
                len(inputs.order.drawn),
            )  # fmt: skip

    def prompts(self) -> list[tuple[str, str]]:
        """(kind, prompt) of what samples are drawn of."""
        data, sample = self.cfg.data, self.cfg.sample
        found = [("instance", data.instance_prompt or self.inputs.views[0].caption)]
        found += [("class", data.class_prompt)] if data.class_prompt else []
        return found + [("unrelated", text) for text in sample.unrelated] + [("more", text) for text in sample.prompts]

    def numbers(self, prompts: list[str]) -> list[int]:
        return [self.captions.index(prompt) for prompt in prompts]

    def _probe_views(self, how: Drawing) -> dict[str, list[View]]:
        cfg, found = self.cfg, {}
        if not cfg.eval.images:
            return {}
        seed = cfg.train.seed + HELD_OUT
        if cfg.data.class_prompt:
            found["class"] = self._made(cfg.data.class_prompt, cfg.eval.images, seed, how, "held-out class")
        share = math.ceil(cfg.eval.images / max(1, len(cfg.sample.unrelated)))
        unrelated = [view for text in cfg.sample.unrelated for view in self._made(text, share, seed, how, "unrelated")]
        return found | ({"unrelated": unrelated} if unrelated else {})

    def _made(self, prompt: str, count: int, seed: int, how: Drawing, name: str) -> list[View]:
        files = class_images(self.pipe, self.identity, prompt, count, seed, how, self.stop, name)
        framing = Framing(how.width, self.inputs.framing.step, False, 1, self.cfg.data.flip and name == "class")
        return [view for file in files for view in views_of(FoundImage(file, (how.width, how.height)), prompt, framing)]

    def _pictures(self, views: list[View], mask: str | None) -> Pictures:
        scale = latent_scale(self.pipe)
        latents = self._latents(views) if self.cfg.data.cache and views else None
        masks = None
        if mask:
            folder = None if mask == "alpha" else Path(mask).expanduser()
            masks = load_masks(views, Masks(folder), self.inputs.background, scale)
        numbers = self.numbers([view.caption for view in views])
        return Pictures(views, numbers, self.inputs.background, scale, self.pipe.vae.config.latent_channels, latents, masks)

    def _latents(self, views: list[View]) -> list[tuple[torch.Tensor, torch.Tensor]]:
        key = content_hash(self.inputs.base.digest, fingerprint(views), self.inputs.background, str(self.device))
        path = cache_root() / "latents" / f"{key}.safetensors"
        with Meter("latents", len(views)) as meter:

            def advance() -> None:
                meter.advance()
                self.stop.check()

            return load_latents(views, path, self.inputs.background, lambda x: encode_pixels(self.pipe.vae, x), advance)
