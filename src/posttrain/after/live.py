"""A finished run's result in memory, as others would load it: base, adapter on it, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.errors import UserError
from posttrain.models.adapters import load_adapter
from posttrain.models.base import digest, resolve
from posttrain.models.causal import load_causal, load_tokenizer
from posttrain.models.quantize import quantization
from posttrain.rundir import checked_weights, read_manifest


@dataclass(frozen=True)
class Live:
    """model: of transformers, or peft's around it, in evaluation mode. weights: the run's adapter/ or model/ directory."""

    model: Any
    tokenizer: Any
    manifest: dict[str, Any]
    weights: Path


def load_base(manifest: dict[str, Any], device: str, dtype: str, quantized: bool) -> Any:
    """The base that a run's adapter belongs to. Raises UserError where its weights are not those of the run."""
    base, quant = manifest["base"], manifest["quant"]
    source = resolve(base["path"], base["revision"])
    if digest(source.directory) != base["digest"]:
        raise UserError(f"base: {base['path']} is not what the run was trained on (digests differ); give the run's own base")
    config = quantization(quant, device) if quantized else None
    return load_causal(base["path"], base["revision"], dtype, device, False, config)


def load_live(run: Path, device: str = "cpu", dtype: str | None = None, quantized: bool = True) -> Live:
    """Load the result of the run directory `run`, whose files are checked first.

    dtype: None, as it was trained. quantized: with the base in 4 bit where it was trained so; False: in 16 or 32 bit.
    """
    manifest = read_manifest(run)
    weights = checked_weights(run, manifest, "run")
    kind, precision = manifest["weights"]["kind"], dtype or manifest["dtype"]
    tokenizer = load_tokenizer(str(weights), None, False, None)
    if kind == "model":
        return Live(load_causal(str(weights), None, precision, device, False, None).eval(), tokenizer, manifest, weights)
    model = load_adapter(load_base(manifest, device, precision, quantized), weights)
    return Live(model.eval(), tokenizer, manifest, weights)
