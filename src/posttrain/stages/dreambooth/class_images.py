"""Pictures that the frozen model makes of a prompt, once: kept by model, prompt and seed, and added to where more are wanted."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from PIL import Image

from posttrain.console import Meter, say
from posttrain.models.diffusion.families import encode_texts, negative_texts
from posttrain.models.diffusion.image_generation import Drawing, draw
from posttrain.runs.cache_place import cache_root, hold, locked, make_directory, place_of, refused, used
from posttrain.runs.files import replacing, write_json
from posttrain.runs.identity import content_hash


def class_images(
    pipe: Any, identity: str, prompt: str, count: int, seed: int, how: Drawing, check: Callable[[], None], name: str
) -> list[Path]:
    """The first `count` pictures of `prompt`. identity: names the model, its precision included. name: what is shown meanwhile.

    Picture i is drawn by seed + i, so it is the same however many there are.
    check: called between batches, where it may raise Stopped; what is there stays.
    """
    recipe = {"model": identity, "prompt": prompt, "seed": seed, **how._replace(batch_size=0)._asdict()}
    kept = cache_root() / "class_images" / content_hash(recipe)
    if files := _all_of(kept, count):  # then a cache for reading alone will do
        return files
    folder = place_of(kept)
    if folder != kept and (files := _all_of(folder, count)):
        return files
    try:
        make_directory(folder.parent)
        with locked(folder):
            folder.mkdir(exist_ok=True)
            hold(folder)
            files = [folder / f"{i:05d}.png" for i in range(count)]
            if missing := [i for i, file in enumerate(files) if not _is_whole(file)]:
                already = count - len(missing)
                write_json(folder / "recipe.json", recipe)
                there = f", {already} are there already" if already else ""
                say(f"{name}: drawing {len(missing)} pictures of '{prompt}'{there}")
                _fill(pipe, prompt, missing, files, seed, how, check, name)
    except OSError as error:
        raise refused(folder, error) from None
    return files


def _all_of(folder: Path, count: int) -> list[Path]:
    """The pictures there, held for this process; none where one is missing."""
    hold(folder)
    files = [folder / f"{i:05d}.png" for i in range(count)]
    if all(map(_is_whole, files)):
        used(folder)
        return files
    return []


def _is_whole(file: Path) -> bool:
    """PNG knows its own checksums. What is damaged is named, and drawn again."""
    if not file.exists():
        return False
    try:
        with Image.open(file) as image:
            image.verify()
    except (OSError, SyntaxError, ValueError) as error:
        say(f"cache: {file} is damaged ({error}); it is made again")
        with suppress(OSError):
            file.unlink(missing_ok=True)
        return False
    return True


def _fill(
    pipe: Any, prompt: str, missing: list[int], files: list[Path], seed: int, how: Drawing, check: Callable[[], None], name: str
) -> None:
    texts, negative = encode_texts(pipe, [prompt]), negative_texts(pipe)
    with Meter(name, len(missing)) as meter:
        for start in range(0, len(missing), how.batch_size):
            chosen = missing[start : start + how.batch_size]
            rows = {key: value.expand(len(chosen), *value.shape[1:]) for key, value in texts.items()}
            for i, image in zip(chosen, draw(pipe, rows, negative, [seed + i for i in chosen], how), strict=True):
                with replacing(files[i]) as scratch:
                    image.save(scratch, format="PNG")
                meter.advance()
            check()
