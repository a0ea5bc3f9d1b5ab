"""1. What DreamBooth reads before a weight is loaded: the pipeline, the pictures of the individual, and its words."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from PIL import ImageColor

from posttrain.data.collate import BatchSampler
from posttrain.data.images.captions import captions_of, check_token
from posttrain.data.images.folder import FoundImage, Framing, View, find_images, fingerprint, views_of
from posttrain.errors import UserError
from posttrain.models.diffusion.pipelines import find_pipeline, native_size, pipeline_directory
from posttrain.models.hub import BaseInfo
from posttrain.runs.artifact import open_artifact
from posttrain.runs.identity import content_hash
from posttrain.runs.manifest import Parent
from posttrain.stages.dreambooth.config import Dreambooth


@dataclass(frozen=True)
class ImageData:
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
        """How many pictures are smaller than they are trained at."""
        return len({view.path for view in self.views if view.original < (view.width, view.height)})


def read_images(cfg: Dreambooth, world_size: int, weights: bool = True) -> ImageData:
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
    cfg.peft.check_steps(order.num_steps)
    key = content_hash(fingerprint(views), fingerprint(class_views))
    return ImageData(
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
    return find_pipeline(artifact.source, None, weights, "init"), artifact.parents("init")


def _check_masks(folder: Path, instance: list[FoundImage]) -> None:
    if not folder.is_dir():
        raise UserError(f"data.mask: {folder} is no folder; give one with a mask for each picture, or say data.mask=alpha")
    there = {path.stem for path in folder.iterdir()}
    if missing := [found.path.name for found in instance if found.path.stem not in there]:
        raise UserError(f"data.mask: {folder} has no mask for {missing[0]} (and {len(missing) - 1} more)")


def lines_of(cfg: Dreambooth, directory: Path, data: ImageData) -> list[str]:
    """What is about to happen, in the user's words: model, pictures, and what became of them."""
    order = data.order
    token = f", token '{data.token}'" if data.token else ""
    size = f"{data.framing.side}x{data.framing.side}" + (" in area" if cfg.data.buckets else "")
    lines = [
        f"model {data.base.name}",
        f"data {cfg.data.instance_dir}: {len(data.instance)} pictures, {len(data.views)} views of {size}{token}",
        *(f"  left out: {line}" for line in data.left_out),
    ]
    if data.upscaled:
        lines.append(f"  {data.upscaled} are smaller than that and are enlarged")
    if cfg.prior.weight > 0:
        count = len({view.path for view in data.class_views}) or cfg.prior.images
        origin = f"of {cfg.data.class_dir}" if cfg.data.class_dir else "from the frozen model"
        lines.append(f"prior '{cfg.data.class_prompt}': {count} class images {origin}, weight {cfg.prior.weight:g}")
    else:
        lines.append("no prior preservation (prior.weight=0): the class may drift to the individual")
    both = " and as many of the prior" if cfg.prior.weight > 0 else ""
    return [*lines, f"{order.num_steps} steps of {order.units_per_step} pictures of the individual{both} -> {directory}"]
