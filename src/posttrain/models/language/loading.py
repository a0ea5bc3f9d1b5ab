"""A finished run's result in memory, as others would load it: base, adapter on it, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config.choices import Kernels
from posttrain.errors import UserError
from posttrain.models.hub import digest, resolve
from posttrain.models.kernels.attention import default_attention
from posttrain.models.language.packed_lm import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.peft.attach import load_adapter
from posttrain.models.quantization import quantization
from posttrain.runs.directory import checked_weights, read_manifest


@dataclass(frozen=True)
class LoadedModel:
    """model: of transformers, or peft's around it, in evaluation mode. name: where it came from. source: of the base, for its
    generation config. weights: the run's own files. digest: of the base's weights, '' for a bare model. kernels: as the run had
    `model.kernels`."""

    name: str
    model: Any
    tokenizer: Any
    source: str
    digest: str = ""
    weights: Path = Path()
    revision: str | None = None  # of source
    kernels: Kernels = "auto"

    @property
    def attention(self) -> str:
        """How packs are read."""
        return default_attention(self.model.device)


def load_base(manifest: dict[str, Any], device: str, dtype: str, quantized: bool) -> Any:
    """The base that a run's adapter belongs to. Raises UserError where its weights are not those of the run."""
    base, quant = manifest["base"], manifest["quant"]
    source = resolve(base["path"], base["revision"])
    if digest(source.directory) != base["digest"]:
        raise UserError(f"base: {base['path']} is not what the run was trained on (digests differ); give the run's own base")
    config = quantization(quant, device) if quantized else None
    return load_causal(base["path"], base["revision"], dtype, device, False, config)


def load_model(run: Path | str, device: str = "cpu", dtype: str | None = None, quantized: bool = True) -> LoadedModel:
    """Load a run directory's result, whose files are checked first, or a bare model (a directory, a hub id, a built-in name).

    dtype: None, as it was trained; of a bare model bfloat16. quantized: with the base in 4 or 8 bit where it was trained so.
    """
    directory = Path(run).expanduser()
    if not (directory / "manifest.json").exists():
        if directory.is_dir() and not (directory / "config.json").exists():
            raise UserError(f"{directory} is no finished run (no manifest.json)")
        model = load_causal(str(run), None, dtype or "bfloat16", device, False, None)
        return LoadedModel(str(run), model.eval(), load_tokenizer(str(run), None, False, None), str(run))
    manifest = read_manifest(directory)
    if "pipeline" in manifest:
        raise UserError(f"{directory} is of a diffusion model; posttrain sample draws with it, and its page has its figures")
    weights = checked_weights(directory, manifest, "run")
    precision, kernels = dtype or manifest["dtype"], manifest.get("kernels", {}).get("choice", "auto")
    tokenizer = load_tokenizer(str(weights), None, False, None)
    if manifest["weights"]["kind"] == "model":
        model = load_causal(str(weights), None, precision, device, False, None)
        return LoadedModel(str(run), model.eval(), tokenizer, str(weights), weights=weights, kernels=kernels)
    base = manifest["base"]
    model = load_adapter(load_base(manifest, device, precision, quantized), weights)
    return LoadedModel(str(run), model.eval(), tokenizer, base["path"], base["digest"], weights, base["revision"], kernels)


def is_scorer(run: str | Path) -> bool:
    """Is it a reward model's run?"""
    directory = Path(run).expanduser()
    return (directory / "manifest.json").exists() and read_manifest(directory)["stage"] == "rm"


def scorer(live: LoadedModel) -> PackedScorer:
    """A reward model that reads packs, with the head it was saved with."""
    found = PackedScorer(live.model, live.attention, live.kernels)
    found.load_head(live.weights)
    return found.eval()


def load_models(runs: list[str], device: str) -> tuple[LoadedModel, list[str]]:
    """The first run's result, with the others' adapters beside it on the same base; and their names, by which `switch` chooses.

    Raises UserError for adapters of another base, and for whole models, which have nothing to switch.
    """
    for run in runs:
        if is_scorer(run):
            raise UserError(f"{run} is a reward model: it scores, and cannot write; give the run that it was made from")
    live = load_model(runs[0], device)
    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the runs' names are not distinct: {', '.join(names)}")
    for name, run in zip(names[1:], runs[1:], strict=True):
        manifest = read_manifest(Path(run))
        if not live.digest or manifest["weights"]["kind"] == "model" or manifest["base"]["digest"] != live.digest:
            raise UserError(f"{run} has no adapter on the base of {runs[0]}; give runs of one base, or one run")
        live.model.load_adapter(str(checked_weights(Path(run), manifest, "run")), name)
    return live, names


def switch(live: LoadedModel, names: list[str], name: str) -> None:
    """Make the adapter called `name` the active one."""
    if live.digest:
        live.model.set_adapter("default" if name == names[0] else name)


def device_here() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
