"""What DreamBooth runs leave, after them: pictures by name, merged pipelines, and several adapters as one."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch import Tensor

from posttrain.batch import ImagePart
from posttrain.console import Meter, say
from posttrain.errors import RunError, UserError
from posttrain.models.diffusion.denoiser import LORA_FILE, load_adapter, lora_tensors, read_factors, save_pipeline, write_tensors
from posttrain.models.diffusion.families import FAMILIES, DiffusionModel, encode_texts, negative_texts
from posttrain.models.diffusion.image_generation import Drawing, draw
from posttrain.models.diffusion.pipelines import find_pipeline, load_pipeline, native_size, pipeline_directory
from posttrain.models.hub import BaseInfo
from posttrain.models.language.loading import device_here
from posttrain.models.peft.factors import Factors, joined
from posttrain.models.peft.kinds import require_kind
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.directory import CONFIG, Run, read_config
from posttrain.runs.earlier import same_base
from posttrain.runs.files import scratch_beside, write_json, write_text
from posttrain.runs.identity import digest

LEVELS = (50, 350, 650, 950)  # of 1000, at which a merged pipeline is compared
MOST_APART = 0.02  # of the prediction's norm; rounding to 16 bit is a tenth of it


class Result(NamedTuple):
    """name: of the run's directory. base: the pipeline that its adapter belongs to, or that it is. weights: of the adapter; None
    where it is a whole pipeline."""

    name: str
    base: BaseInfo
    weights: Path | None
    artifact: Artifact


def read_result(run: str | Path) -> Result:
    """A run's directory, whose files are checked, or a pipeline's. Raises UserError for anything else."""
    artifact = open_artifact(run, "run")
    if artifact.is_run and not artifact.is_pipeline:
        raise UserError(f"run: {run} is a {artifact.stage} run, of a language model; posttrain chat talks with it")
    if artifact.kind == "adapter":
        artifact.finished()
    artifact.verified()
    name, base = Path(run).expanduser().name, find_pipeline(artifact.source, artifact.base.revision, field=artifact.field)
    if artifact.kind == "model":
        return Result(name, base, None, artifact)
    if not same_base(base.digest, artifact.base.digest):
        raise UserError(f"base: {base.path} is not what {run} was trained on (digests differ); give the run's own base")
    return Result(name, base, artifact.weights, artifact)


def sample(
    runs: list[str], prompts: list[str], out: Path, images: int, seed: int, steps: int, guidance: float | None, size: int | None
) -> list[Path]:
    """Draw every prompt with every run's result, by the same seeds: adapters of one base are switched by the runs' names."""
    results = [read_result(run) for run in runs]
    names = [result.name for result in results]
    if len(set(names)) < len(names):
        raise UserError(f"the runs' names are not distinct: {', '.join(names)}")
    files = []
    for group in _by_base(results):
        pipe = load_pipeline(group[0].base, torch.bfloat16 if device_here() == "cuda" else torch.float32).to(device_here())
        for result in (r for r in group if r.weights):
            load_adapter(pipe, result.weights, result.name)  # type: ignore[arg-type]
        trained = group[0].artifact.manifest
        side = size or (trained and trained.size) or native_size(pipeline_directory(group[0].base))[0]
        how = Drawing(side, side, steps, guidance, 4)
        for result in group:
            files += _draw_with(pipe, result, prompts, out, images, seed, how)
    say(f"{len(files)} pictures in {out}")
    return files


def _by_base(results: list[Result]) -> list[list[Result]]:
    """Adapters of one base together. Raises UserError where one of several is no LoRA, which alone can be switched."""
    groups: dict[tuple[str, bool], list[Result]] = {}
    for result in results:
        groups.setdefault((result.base.digest, result.weights is not None), []).append(result)
    for group in groups.values():
        odd = [r.name for r in group if r.weights and not (r.weights / LORA_FILE).is_file()]
        if odd and len(group) > 1:
            raise UserError(f"run: the adapter of {odd[0]} cannot be switched with others; draw with it alone")
    return list(groups.values())


def _draw_with(pipe: Any, result: Result, prompts: list[str], out: Path, images: int, seed: int, how: Drawing) -> list[Path]:
    if result.weights and (result.weights / LORA_FILE).is_file():
        pipe.set_adapters([result.name])
    texts, negative = encode_texts(pipe, prompts), negative_texts(pipe)
    rows = torch.arange(len(prompts)).repeat_interleave(images)
    seeds = [seed + i for _ in prompts for i in range(images)]
    with Meter(result.name, -(-len(seeds) // how.batch_size)) as meter:
        drawn = draw(pipe, {k: v[rows.to(v.device)] for k, v in texts.items()}, negative, seeds, how, meter.advance)
    out.mkdir(parents=True, exist_ok=True)
    files = []
    for row, number, image in zip(rows.tolist(), seeds, drawn, strict=True):
        words = re.sub(r"[^a-z0-9]+", "-", prompts[row].lower()).strip("-")[:40]
        files.append(out / f"{result.name}-{words}-{number}.png")
        image.save(files[-1])
    return files


def merge_pipeline(run: Path, out: Path) -> dict[str, Any]:
    """Write the base with a run's adapter in its weights, in the base's own dtype; returns by how much it differs from the
    live one.

    Raises UserError for a whole pipeline, and RunError, with nothing written, where the difference is more than rounding.
    """
    result = read_result(run)
    if result.weights is None:
        raise UserError(f"run: {run} is a whole pipeline already, in {run / 'model'}; there is nothing to merge")
    for config in sorted(result.weights.glob("*/adapter_config.json")):
        found = json.loads(config.read_text(encoding="utf-8"))
        if reason := require_kind(found, "run").objection(found):
            raise UserError(f"run: its adapter cannot be merged ({reason}); posttrain sample draws with it")
    pipe, manifest = load_pipeline(result.base, torch.float32), result.artifact.finished()
    load_adapter(pipe, result.weights, "run")
    prompts = list(manifest.prompts.values())
    live = _predictions(pipe, prompts)
    names = sorted(manifest.trained_parts)
    parts = _merged_parts(pipe, names, (result.weights / LORA_FILE).is_file())
    base_dir = pipeline_directory(result.base)
    with scratch_beside(out) as scratch:
        made = scratch / "merged"
        save_pipeline(base_dir, {name: part.to(_dtype_on_disk(base_dir / name)) for name, part in parts.items()}, made)
        merged = _predictions(load_pipeline(find_pipeline(str(made), None), torch.float32), prompts)
        apart = float((merged - live).norm() / live.norm())
        say(f"predictions differ by {apart:.2e} of their norm from the live adapter's")
        if not apart <= MOST_APART:
            raise RunError(f"the merged pipeline differs from the live one by {apart:.1%}; nothing was written")
        figures = {"run": str(run.resolve()), "difference": apart, "quant": manifest.quant.method}
        write_json(made / "merge.json", figures)
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    return figures


def _merged_parts(pipe: Any, names: list[str], is_lora: bool) -> dict[str, Any]:
    if is_lora:
        pipe.fuse_lora(components=names)
        pipe.unload_lora_weights()
        return {name: getattr(pipe, name) for name in names}
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name in names:
        part = getattr(pipe, name)
        for path, layer in [(p, m) for p, m in part.named_modules() if isinstance(m, BaseTunerLayer)]:
            layer.merge()  # pyright: ignore
            parent, _, last = path.rpartition(".")
            setattr(part.get_submodule(parent), last, layer.get_base_layer())
    return {name: getattr(pipe, name) for name in names}


def _dtype_on_disk(part: Path) -> torch.dtype:
    from safetensors import safe_open

    with safe_open(sorted(part.glob("*.safetensors"))[0], framework="pt") as file:
        return file.get_tensor(next(iter(file.keys()))).dtype


@torch.no_grad()
def _predictions(pipe: Any, prompts: list[str]) -> Tensor:
    """What the denoiser says of random latents at some noise levels, for each prompt."""
    family = FAMILIES[type(pipe).__name__]
    model = DiffusionModel(pipe, prompts, encode_texts(pipe, prompts), {family.denoiser: getattr(pipe, family.denoiser)}).eval()
    side = native_size_of(pipe)
    generator = torch.Generator().manual_seed(0)
    count = len(LEVELS) * len(prompts)
    noisy = torch.randn(count, pipe.vae.config.latent_channels, side, side, generator=generator)
    zeros = torch.zeros_like(noisy)
    part = ImagePart(
        mean=zeros, std=zeros, pixels=None, draw=zeros, noise=zeros, offset=zeros[:, :, :1, :1],
        level=torch.tensor(LEVELS).repeat(len(prompts)) * len(model.noising.sigma) // 1000,
        caption=torch.arange(len(prompts)).repeat_interleave(len(LEVELS)), sizes=torch.full((count, 6), 256.0), mask=None,
        num_instance=count,
    )  # fmt: skip
    return model(part, noisy)


def native_size_of(pipe: Any) -> int:
    """Latents a side to compare on: small, for one number a layer would do."""
    return min(32, getattr(getattr(pipe, FAMILIES[type(pipe).__name__].denoiser).config, "sample_size", None) or 32)


def compose_pipelines(runs: list[Path], weights: list[float], out: Path) -> dict[str, Any]:
    """Write the weighted sum of LoRAs of one base to `out`, exactly, as a finished run's directory; returns its manifest."""
    results = [read_result(run) for run in runs]
    first = results[0]
    for result, run in zip(results, runs, strict=True):
        if result.weights is None:
            raise UserError(f"{run} is a whole pipeline; only adapters can be composed")
        if result.base.digest != first.base.digest:
            raise UserError(f"{run} belongs to another base ({result.base.name}) than {runs[0]} ({first.base.name})")
    found: dict[str, dict[str, list[Factors]]] = {}
    for result, weight in zip(results, weights, strict=True):
        for part, layers in read_factors(result.weights or Path(), f"compose: {result.name}").items():
            for layer, factors in layers.items():
                found.setdefault(part, {}).setdefault(layer, []).append(factors.times(weight))
    tensors: dict[str, Tensor] = {}
    for part, layers in found.items():
        tensors |= lora_tensors(part, {name: joined(parts) for name, parts in layers.items()})
    with scratch_beside(out) as scratch:
        made = scratch / "run"
        write_tensors(tensors, made / "adapter")
        config = read_config(runs[0])
        write_text(made / CONFIG, yaml.safe_dump(config, sort_keys=False))
        sums = [{"run": str(run.resolve()), "weight": weight} for run, weight in zip(runs, weights, strict=True)]
        write_json(made / "compose.json", {"sum": sums})
        manifests = [result.artifact.finished() for result in results]
        record = manifests[0].to_dict("base", "weights", "pipeline", "size", "dtype", "quant")
        record["prompts"] = {f"instance {r.name}": m.prompts["instance"] for r, m in zip(results, manifests, strict=True)}
        parents = [parent for result in results for parent in result.artifact.parents("init")]
        record |= {"stage": "compose", "parents": parents, "sum": sums}
        record |= {"trained_parts": sorted(found), "token": [m.token for m in manifests], "peft": {"method": "lora"}}
        record |= {"metrics": {}, "data": [], "steps": 0, "images": 0, "seconds": 0.0, "seed": None}
        manifest = Run(made, {**config, "sum": sums}).finish({**record, "digest": digest({"sum": sums})})
        shutil.rmtree(out, ignore_errors=True)
        made.rename(out)
    say("  ".join(f"{weight:+.4g} × {result.name}" for result, weight in zip(results, weights, strict=True)))
    say(f"composed adapter {out / 'adapter'}")
    return manifest.to_dict()
