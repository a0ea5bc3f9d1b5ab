"""Folders of pictures -> views: crops of an exact size, upright, without alpha, each with its caption.

Flips and crops are not drawn at random but counted out: each is a view of its own, so that its latent can be kept.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from posttrain.errors import UserError

Background = tuple[int, int, int]


class View(NamedTuple):
    """A crop of a picture. width, height: of the result. resized: width and height of the whole picture, of which the crop at
    left, top is taken; original: of the file's, upright."""

    path: Path
    caption: str
    width: int
    height: int
    resized: tuple[int, int]
    left: int
    top: int
    flipped: bool
    original: tuple[int, int]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Original height and width, the crop's top and left, height and width: what SDXL is told (Podell et al. 2023, section
        2.2)."""
        return (self.original[1], self.original[0], self.top, self.left, self.height, self.width)


@dataclass(frozen=True)
class Framing:
    """How a picture becomes views. side: pixels of the square, or of the square of equal area where `buckets` keep the
    picture's own shape, in steps of `step`."""

    side: int
    step: int
    buckets: bool
    crops: int
    flip: bool


class FoundImage(NamedTuple):
    """A readable picture. size: width and height, upright."""

    path: Path
    size: tuple[int, int]


def find_images(folder: Path, field: str, corrupt: Literal["stop", "skip"]) -> tuple[list[FoundImage], list[str]]:
    """The pictures of a folder by name, each decoded once, and a line for each that was left out.

    Raises UserError, about `field`, where there is no picture, or one cannot be read and corrupt is stop.
    """
    if not folder.is_dir():
        what = "is a file; give the folder that it is in" if folder.exists() else "does not exist"
        raise UserError(f"{field}: {folder} {what}")
    Image.init()
    files = [p for p in sorted(folder.iterdir()) if p.suffix.lower() in Image.EXTENSION and not p.name.startswith(".")]
    if not files:
        below = sorted({p.parent.name for p in folder.glob("*/*") if p.suffix.lower() in Image.EXTENSION})
        hint = f"; there are some in {folder / below[0]}" if below else ""
        raise UserError(f"{field}: no images in {folder}{hint}")
    found, left_out = [], []
    for path in files:
        try:
            with open_upright(path) as image:
                found.append(FoundImage(path, image.size))
        except UserError as error:
            if corrupt == "stop":
                raise UserError(f"{field}: {error}; remove it, or say data.corrupt=skip") from None
            left_out.append(str(error))
    if not found:
        raise UserError(f"{field}: none of the {len(files)} images in {folder} can be read ({left_out[0]})")
    return found, left_out


def open_upright(path: Path) -> Image.Image:
    """The first frame, decoded, turned as its EXIF says. Raises UserError for what cannot be decoded or is far too large."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(path)
            image.load()
        return ImageOps.exif_transpose(image)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise UserError(f"{path.name} has more than {Image.MAX_IMAGE_PIXELS or 0:,} pixels; make it smaller") from None
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, EOFError) as error:
        reason = "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise UserError(f"{path.name} cannot be read ({reason})") from None


def views_of(found: FoundImage, caption: str, framing: Framing) -> Iterator[View]:
    """All crops of a picture, and their mirror images."""
    width, height = _shape(found.size, framing)
    scale = max(width / found.size[0], height / found.size[1])
    resized = (max(width, round(found.size[0] * scale)), max(height, round(found.size[1] * scale)))
    spare = (resized[0] - width, resized[1] - height)
    corners = [(spare[0] // 2, spare[1] // 2)]
    if framing.crops > 1 and any(spare):
        shares = [i / (framing.crops - 1) for i in range(framing.crops)]
        corners = list(dict.fromkeys((round(spare[0] * share), round(spare[1] * share)) for share in shares))
    for flipped in (False, True)[: 1 + framing.flip]:
        for left, top in corners:
            yield View(found.path, caption, width, height, resized, left, top, flipped, found.size)


def _shape(size: tuple[int, int], framing: Framing) -> tuple[int, int]:
    """Width and height of a picture's views: the square, or the bucket nearest to its own shape."""
    if not framing.buckets:
        return framing.side, framing.side
    step, area = framing.step, framing.side**2
    widths = range(step * max(1, framing.side // (2 * step)), 2 * framing.side + 1, step)
    shapes = [(w, max(step, round(area / w / step) * step)) for w in widths]
    return min(shapes, key=lambda shape: abs(np.log(shape[0] / shape[1] * size[1] / size[0])))


def read_view(view: View, background: Background) -> tuple[Tensor, Tensor]:
    """Pixels float32 [3, height, width] in -1..1, and alpha float32 [1, height, width] in 0..1; what is transparent has the
    background's colour."""
    with open_upright(view.path) as image:
        whole = _to_rgba(image)
    flat = Image.new("RGBA", whole.size, (*background, 255))
    flat.alpha_composite(whole)
    layers = [_cropped(layer, view) for layer in (flat.convert("RGB"), whole.getchannel("A"))]
    pixels = torch.from_numpy(layers[0].astype(np.float32) / 127.5 - 1).permute(2, 0, 1).contiguous()
    return pixels, torch.from_numpy(layers[1].astype(np.float32) / 255)[None]


def as_image(pixels: Tensor) -> Image.Image:
    """The picture of a view's pixels [3, height, width]."""
    return Image.fromarray(((pixels.permute(1, 2, 0) + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy())


def read_mask(path: Path, view: View) -> Tensor:
    """A picture of what counts (white) and what does not (black), cropped as the view is: float32 [1, height, width] in
    0..1."""
    with open_upright(path) as image:
        layer = image.convert("L")
    return torch.from_numpy(_cropped(layer, view).astype(np.float32) / 255)[None]


def _cropped(layer: Image.Image, view: View) -> np.ndarray:
    box = (view.left, view.top, view.left + view.width, view.top + view.height)
    layer = layer.resize(view.resized, Image.Resampling.LANCZOS).crop(box)
    return np.array(ImageOps.mirror(layer) if view.flipped else layer)


def _to_rgba(image: Image.Image) -> Image.Image:
    """From any mode; 16-bit grey keeps its upper half, which Pillow's own conversion would clip."""
    if image.mode.startswith("I;16") or image.mode == "I":
        grey = np.asarray(image, dtype=np.int64)
        image = Image.fromarray((grey >> 8 if grey.max() > 255 else grey).clip(0, 255).astype(np.uint8))
    return image.convert("RGBA")


def fingerprint(views: list[View]) -> str:
    """Names views by the content of their files, how they are cropped, and what they are called."""
    hashes = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in {view.path for view in views}}
    lines = [f"{hashes[view.path]} {view[1:]}" for view in views]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()
