"""Which diffusion pipeline a name means, and how one is loaded."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download

from posttrain.errors import UserError, did_you_mean
from posttrain.models.diffusion.families import FAMILIES, diffusers, quiet
from posttrain.models.diffusion.tiny import TINY, make_tiny
from posttrain.models.hub import BaseInfo, digest
from posttrain.runs.cache import cached_directory
from posttrain.runs.cache_place import cache_root

INDEX = "model_index.json"
FILES = [INDEX, *(f"*/*{end}" for end in (".json", ".safetensors", ".txt", ".model"))]
VARIANTS = ["*.fp16.safetensors", "*.non_ema.safetensors", "*/openvino*", "*/flax*"]
LIBRARIES = ("diffusers", "transformers")  # whose classes a pipeline is made of
LEFT_OUT = ("safety_checker", "feature_extractor", "image_encoder")  # parts that neither training nor our samples need


def find_pipeline(name: str, revision: str | None, weights: bool = True, field: str = "model.name") -> BaseInfo:
    """Fetches files, without `weights` only the small ones; loads nothing.

    field: where the name stands, for the UserError that is raised for what is no diffusion pipeline of a known family.
    """
    directory, path, revision = _locate(name, revision, weights, field)
    index = directory / INDEX
    if not index.is_file():
        what = "a model, but no diffusion pipeline" if (directory / "config.json").is_file() else "no diffusion pipeline"
        raise UserError(f"{field}: '{name}' is {what} (it has no {INDEX}); give one such as sd15, sdxl, sd3, flux or tiny")
    try:
        found = json.loads(index.read_text(encoding="utf-8"))
        kind, custom = str(found.get("_class_name")), _custom_part(found)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise UserError(f"model.name: {index} cannot be read ({error}); give a pipeline made by save_pretrained") from error
    if custom:
        raise UserError(
            f"model.name: '{name}' takes its {custom} from code of its own, which is never run; give a pipeline whose parts are "
            f"classes of {' and '.join(LIBRARIES)}"
        )
    if kind not in FAMILIES:
        raise UserError(f"{field}: '{name}' is a {kind}, which cannot be trained here (there are: {', '.join(FAMILIES)})")
    return BaseInfo(name, path, revision, digest(directory))


def _custom_part(index: dict[str, Any]) -> str | None:
    """The first part, or the pipeline itself, whose class does not come from a known library. Parts that are never loaded may."""
    modules = {name: value[0] for name, value in index.items() if isinstance(value, list) and value and name not in LEFT_OUT}
    modules |= {"custom_pipeline": index.get("custom_pipeline")}
    return next((name for name, module in modules.items() if module not in (None, *LIBRARIES)), None)


def pipeline_directory(base: BaseInfo) -> Path:
    """Where the files of a base are."""
    return _locate(base.path, base.revision)[0]


def _locate(name: str, revision: str | None, weights: bool = True, field: str = "model.name") -> tuple[Path, str, str | None]:
    directory = Path(name).expanduser()
    builtin = _gone(directory) or name
    if builtin in TINY:
        made, _ = cached_directory(cache_root() / "pipelines" / f"{builtin}-v1", partial(make_tiny, builtin))
        return made, str(made), None
    if directory.is_dir():
        return directory.resolve(), str(directory.resolve()), None
    try:
        left_out = VARIANTS if weights else [*VARIANTS, "*.safetensors"]
        directory = Path(snapshot_download(name, revision=revision, allow_patterns=FILES, ignore_patterns=left_out))
    except Exception as error:  # the hub's client has no common class for its own
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        hint = did_you_mean(name, sorted(TINY)) or f"; made by the tool: {', '.join(sorted(TINY))}"
        raise UserError(f"{field}: '{name}' is no directory and not to be had from the hub ({reason}){hint}") from error
    return directory, name, directory.name  # a snapshot's directory is named after its commit


def _gone(directory: Path) -> str:
    """Name of the built-in pipeline that a run names by its place in a cache, which was cleaned or has moved; '' for all else."""
    gone = directory.parent.name == "pipelines" and not directory.exists()
    return directory.name.removesuffix("-v1") if gone else ""


def native_size(directory: Path) -> tuple[int, int]:
    """Pixels a side that a pipeline was made for, and what every side must be a multiple of."""
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    denoiser = FAMILIES[index["_class_name"]].denoiser
    config = json.loads((directory / denoiser / "config.json").read_text(encoding="utf-8"))
    vae = json.loads((directory / "vae" / "config.json").read_text(encoding="utf-8"))
    scale = 2 ** (len(vae["block_out_channels"]) - 1)
    halvings = len(config["block_out_channels"]) - 1 if denoiser == "unet" else 1
    side = config.get("sample_size") or vae["sample_size"] // scale  # Flux's transformer was made for no size of its own
    return side * scale, scale * 2**halvings


def load_pipeline(base: BaseInfo, dtype: torch.dtype) -> Any:
    """The pipeline, frozen, without what training does not need; its autoencoder always in float32, where it overflows
    least."""
    quiet()
    directory = pipeline_directory(base)
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    absent = {name: None for name in LEFT_OUT if name in index} | {"requires_safety_checker": False}
    absent = {name: value for name, value in absent.items() if name in index}
    pipe = diffusers.DiffusionPipeline.from_pretrained(
        directory, dtype={"default": dtype, "vae": torch.float32}, local_files_only=True, use_safetensors=True, **absent
    )
    pipe.set_progress_bar_config(disable=True)
    for module in pipe.components.values():
        if isinstance(module, torch.nn.Module):
            module.requires_grad_(False).eval()
    return pipe


def shapes_of_pipeline(directory: Path, dtype: torch.dtype) -> Any:
    """The pipeline on the meta device: its tokenizers and schedule, and its models as shapes alone."""
    import transformers

    quiet()
    index = json.loads((directory / INDEX).read_text(encoding="utf-8"))
    parts: dict[str, Any] = {}
    for name, (library, kind) in ((n, v) for n, v in index.items() if isinstance(v, list)):
        if library is None or name in LEFT_OUT:
            parts[name] = None
            continue
        made: Any = getattr(diffusers if library == "diffusers" else transformers, kind)
        if not issubclass(made, torch.nn.Module):
            parts[name] = made.from_pretrained(directory / name)
            continue
        model = _of_shapes(made, directory / name)
        parts[name] = model.to(torch.float32 if name == "vae" else dtype).requires_grad_(False)
    more = {"requires_safety_checker": False} if "requires_safety_checker" in index else {}
    return getattr(diffusers, index["_class_name"])(**parts, **more)


def _of_shapes(kind: Any, folder: Path) -> torch.nn.Module:
    """A model of a class of diffusers or transformers, from its config alone."""
    with torch.device("meta"):
        if hasattr(kind, "load_config"):
            return kind.from_config(kind.load_config(folder))
        return kind(kind.config_class.from_pretrained(folder))
