"""Which model a name means, where its files are, and a digest that tells it from every other."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import snapshot_download

from posttrain.errors import UserError, did_you_mean, reading
from posttrain.models.builtin import BUILTIN, FILES, builtin_directory
from posttrain.models.fingerprint import FORM, function_files, function_of
from posttrain.runs.cache import cached_json
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import copy_own, sha256


class BaseInfo(NamedTuple):
    """name: as the user gave it. path: a hub id or an absolute directory, by which peft finds the base again."""

    name: str
    path: str
    revision: str | None
    digest: str


class ResolvedModel(NamedTuple):
    """What a model name stands for: its files, the commit that they are of, and in words where they come from."""

    path: str  # a hub id or an absolute directory
    directory: Path
    revision: str | None
    origin: str


def resolve(name: str, revision: str | None, weights: bool = True, field: str = "model.name") -> ResolvedModel:
    """A built-in name, a directory or a hub id, which stands in `field` -> files on disk. UserError for anything else."""
    if name in BUILTIN:
        if revision:
            raise UserError(f"model.revision: '{name}' is made by the tool and has no revisions; leave it null")
        directory, origin = builtin_directory(name)
        return ResolvedModel(str(directory), directory, None, origin)
    directory = Path(name).expanduser()
    if made := _again(directory):
        return ResolvedModel(str(made), made, None, "made again in the cache")
    if directory.is_dir():
        if not (directory / "config.json").is_file():
            raise UserError(f"{field}: the directory '{name}' has no config.json; give one made by save_pretrained")
        return ResolvedModel(str(directory.resolve()), directory.resolve(), None, "a directory")
    try:
        files = FILES if weights else [pattern for pattern in FILES if pattern != "*.safetensors"]
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=[*files, "*.py"]))
    except Exception as error:  # the hub's client has no common class for its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        hint = did_you_mean(name, sorted(BUILTIN)) or f"; made by the tool: {', '.join(sorted(BUILTIN))}"
        raise UserError(f"{field}: '{name}' is no directory and not to be had from the hub ({reason}){hint}") from error
    # a snapshot's directory is named after its commit
    return ResolvedModel(name, directory, directory.name, "the hub")


def _again(directory: Path) -> Path | None:
    """A built-in model that a run names by its place in a cache, which was cleaned or has moved; None for all else."""
    name = directory.name.removesuffix("-v1")
    gone = directory.parent.name == "models" and name in BUILTIN and not directory.exists()
    return builtin_directory(name)[0] if gone else None


def copy_processors(base: Path, out: Path) -> None:
    """What makes a picture or a sound into a base's input, for a model that is made of it: unchanged, as training on text is."""
    copy_own(base.glob("*processor_config.json"), base, out)


def context_length(name: str, revision: str | None) -> int | None:
    """Tokens that the model of `name` was made for, where its config says so."""
    file = resolve(name, revision, weights=False).directory / "config.json"
    with reading(f"model.name: {file} cannot be read", "give one made by save_pretrained"):
        config = json.loads(file.read_text(encoding="utf-8"))
        config = config.get("text_config", config)
        return config.get("max_position_embeddings", config.get("n_positions"))


def digest(directory: Path) -> str:
    """`weights:function`: SHA-256 over the hashes of all safetensors files, and what else decides what is computed
    (models/fingerprint.py). Both are read anew only when a file's size or time has changed; runs/earlier.py compares them."""
    function = _once(directory, function_files(directory), lambda: function_of(directory), FORM)
    return f"{_weights(directory)}:{function}"


def _weights(directory: Path) -> str:
    files = sorted(directory.glob("*.safetensors")) or sorted(directory.glob("*/*.safetensors"))  # a pipeline has one a part
    if not files:
        raise UserError(f"model.name: {directory} holds no safetensors file; convert the model with save_pretrained")

    def read_all() -> str:
        lines = [f"{path.relative_to(directory)} {sha256(path)}\n" for path in files]
        return hashlib.sha256("".join(lines).encode()).hexdigest()

    return _once(directory, files, read_all)


def _once(directory: Path, files: list[Path], read: Callable[[], str], *form: int) -> str:
    stats = [(str(file.relative_to(directory)), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    key = hashlib.sha256(json.dumps([str(directory.resolve()), stats, *form]).encode()).hexdigest()
    return cached_json(cache_root() / "digests" / f"{key}.json", read)
