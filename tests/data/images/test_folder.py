"""Pictures of every kind become views of an exact size, with the right caption; what is wrong with one is said by its name."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from posttrain.data.images.captions import captions_of, check_token
from posttrain.data.images.folder import FoundImage, Framing, find_images, fingerprint, open_upright, read_view, views_of
from posttrain.data.images.latents import Masks, load_latents, load_masks
from posttrain.errors import UserError

WHITE, SQUARE = (255, 255, 255), Framing(16, 4, False, 1, False)


def halves(size: tuple[int, int], mode: str = "RGB") -> Image.Image:
    """Left half black, right half white."""
    array = np.zeros((size[1], size[0]), dtype=np.uint8)
    array[:, size[0] // 2 :] = 255
    return Image.fromarray(array).convert(mode)


def pixels(path: Path, framing: Framing = SQUARE, background: tuple[int, int, int] = WHITE) -> torch.Tensor:
    with open_upright(path) as image:
        size = image.size
    (view, *_) = views_of(FoundImage(path, size), "x", framing)
    return read_view(view, background)[0]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp", "bmp", "tiff", "gif"])
def test_usual_formats(ending: str, tmp_path: Path) -> None:
    halves((32, 32)).save(tmp_path / f"a.{ending}")
    found, left_out = find_images(tmp_path, "data.instance_dir", "stop")
    assert [f.size for f in found] == [(32, 32)] and not left_out
    read = pixels(tmp_path / f"a.{ending}")
    assert read.shape == (3, 16, 16) and float(read[:, :, :4].max()) < -0.9 and float(read[:, :, -4:].min()) > 0.9


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I;16", "F"])
def test_any_mode(mode: str, tmp_path: Path) -> None:
    if mode == "I;16":
        grey = np.asarray(halves((32, 32)).convert("L")).astype(np.uint16) * 257
        Image.fromarray(grey).save(tmp_path / "a.png")
        path = tmp_path / "a.png"
    else:
        path = tmp_path / ("a.tiff" if mode in ("CMYK", "F") else "a.png")
        halves((32, 32)).convert("L").convert("RGB" if mode == "CMYK" else mode).convert(mode).save(path)
    read = pixels(path)
    assert float(read[:, :, :4].max()) < -0.9 and float(read[:, :, -4:].min()) > 0.9


def test_exif_orientation_turns_the_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees: what was left is now on top
    halves((40, 20)).save(tmp_path / "a.jpg", exif=exif, quality=95)
    found, _ = find_images(tmp_path, "data.instance_dir", "stop")
    assert found[0].size == (20, 40)
    read = pixels(tmp_path / "a.jpg", Framing(20, 4, False, 1, False))
    assert float(read[:, :4].max()) < -0.8 and float(read[:, -4:].min()) > 0.8


def test_transparent_places_have_the_background_and_alpha_is_a_mask(tmp_path: Path) -> None:
    image = Image.new("RGBA", (16, 16), (255, 0, 0, 255))
    image.paste((0, 255, 0, 0), (0, 0, 8, 16))
    image.save(tmp_path / "a.png")
    (view,) = views_of(FoundImage(tmp_path / "a.png", (16, 16)), "x", SQUARE)
    read, alpha = read_view(view, (0, 0, 255))
    assert read[:, 0, 0].tolist() == [-1, -1, 1] and read[:, 0, 15].tolist() == [1, -1, -1]
    assert alpha[0, 0].tolist() == [0.0] * 8 + [1.0] * 8
    assert load_masks([view], Masks(None), WHITE, 4)[0].tolist() == [[[0.0, 0.0, 1.0, 1.0]] * 4]


def test_crops_are_counted_out_along_the_longer_side_and_mirrored(tmp_path: Path) -> None:
    path = tmp_path / "wide.png"
    halves((64, 16)).save(path)
    views = list(views_of(FoundImage(path, (64, 16)), "x", Framing(16, 4, False, 3, True)))
    assert [(v.left, v.flipped) for v in views] == [(0, False), (24, False), (48, False), (0, True), (24, True), (48, True)]
    read = [read_view(view, WHITE)[0] for view in views]
    assert torch.equal(read[1].flip(2), read[4]) and float(read[0].max()) == -1 and float(read[2].min()) == 1
    assert len(list(views_of(FoundImage(path, (16, 16)), "x", Framing(16, 4, False, 3, False)))) == 1  # a square has one


@pytest.mark.parametrize(("size", "expected"), [((100, 100), (64, 64)), ((200, 100), (88, 48)), ((100, 300), (40, 104))])
def test_buckets_keep_the_shape_at_the_same_area(size: tuple[int, int], expected: tuple[int, int]) -> None:
    (view,) = views_of(FoundImage(Path("x"), size), "x", Framing(64, 8, True, 1, False))
    assert (view.width, view.height) == expected
    assert abs(view.width * view.height / 64**2 - 1) < 0.1
    assert view.resized[0] >= view.width and view.resized[1] >= view.height


def test_tiny_ones_are_enlarged_and_huge_ones_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    halves((3, 2)).save(tmp_path / "tiny.png")
    read = pixels(tmp_path / "tiny.png")
    assert read.shape == (3, 16, 16) and float(read[:, :, 0].max()) < 0 and float(read[:, :, -4:].min()) > 0.9
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    halves((40, 40)).save(tmp_path / "huge.png")
    with pytest.raises(UserError, match=r"huge.png has more than 100 pixels; make it smaller"):
        open_upright(tmp_path / "huge.png")


def test_a_corrupt_picture_is_named_and_refused_or_left_out(tmp_path: Path) -> None:
    for name in "abcd":
        halves((32, 32)).save(tmp_path / f"{name}.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"data.instance_dir: cut.png cannot be read .*; remove it, or say data.corrupt=skip"):
        find_images(tmp_path, "data.instance_dir", "stop")
    found, left_out = find_images(tmp_path, "data.instance_dir", "skip")
    assert [f.path.name for f in found] == ["a.png", "b.png", "c.png", "d.png"] and left_out[0].startswith("cut.png cannot")
    for name in "abcd":
        (tmp_path / f"{name}.png").write_text("no picture")
    with pytest.raises(UserError, match=r"none of the 5 images in .* can be read"):
        find_images(tmp_path, "data.instance_dir", "skip")


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(UserError, match=r"data.instance_dir: no images in"):
        find_images(tmp_path, "data.instance_dir", "stop")
    (tmp_path / "in").mkdir()
    halves((8, 8)).save(tmp_path / "in" / "a.png")
    with pytest.raises(UserError, match=r"no images in .*; there are some in .*in"):
        find_images(tmp_path, "data.instance_dir", "stop")
    with pytest.raises(UserError, match=r"is a file; give the folder"):
        find_images(tmp_path / "notes.txt", "data.instance_dir", "stop")
    with pytest.raises(UserError, match=r"does not exist"):
        find_images(tmp_path / "absent", "data.instance_dir", "stop")


def test_captions_from_files_and_metadata(tmp_path: Path) -> None:
    paths = [tmp_path / f"{name}.png" for name in "ab"]
    assert captions_of(paths, "prompt", " a sks dog ") == ["a sks dog"] * 2
    (tmp_path / "a.txt").write_text("a sks dog\nin snow\n")
    with pytest.raises(UserError, match=r"data.captions: b.png has no b.txt beside it"):
        captions_of(paths, "files", None)
    (tmp_path / "b.txt").write_text("a sks dog at home")
    assert captions_of(paths, "files", None) == ["a sks dog in snow", "a sks dog at home"]
    rows = [{"file_name": "b.png", "text": "second"}, {"file_name": "a.png", "caption": "first"}]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert captions_of(paths, "metadata", None) == ["first", "second"]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    with pytest.raises(UserError, match=r"metadata.jsonl has no row for a.png"):
        captions_of(paths, "metadata", None)
    (tmp_path / "metadata.jsonl").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read"):
        captions_of(paths, "metadata", None)
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,one\nb.png,two\n")
    assert captions_of(paths, "metadata", None) == ["one", "two"]


def test_the_token_is_what_the_class_lacks() -> None:
    assert check_token(["a photo of sks dog"], "a photo of dog", None) == "sks"
    assert check_token(["a Xyz-1 dog."], "a dog", None) == "xyz-1"
    assert check_token(["a sks dog"], None, None) is None
    with pytest.raises(UserError, match=r"'a dog' has no token of its own beside data.class_prompt 'a dog'"):
        check_token(["a dog"], "a dog", None)
    with pytest.raises(UserError, match=r"'a dog in snow' lacks the token 'sks'"):
        check_token(["a sks dog", "a dog in snow"], "a dog", "sks")


def test_latents_are_kept_by_content_and_read_back(tmp_path: Path) -> None:
    halves((16, 16)).save(tmp_path / "a.png")
    views = list(views_of(FoundImage(tmp_path / "a.png", (16, 16)), "x", Framing(16, 4, False, 1, True)))
    calls: list[int] = []

    def encode(batch: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        calls.append(len(batch))
        return batch[:, :1, ::4, ::4], torch.ones(len(batch), 1, 4, 4)

    first = load_latents(views, tmp_path / "kept.safetensors", WHITE, encode, lambda: None)
    again = load_latents(views, tmp_path / "kept.safetensors", WHITE, encode, lambda: None)
    assert calls == [1, 1]
    assert all(torch.equal(a, b) for x, y in zip(first, again, strict=True) for a, b in zip(x, y, strict=True))
    before = fingerprint(views)
    halves((16, 16)).rotate(90).save(tmp_path / "a.png")
    assert fingerprint(views) != before
