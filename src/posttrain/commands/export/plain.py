"""A result as a plain model directory, which most targets begin with."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file

from posttrain.commands.merge import FORMS, merge_run
from posttrain.console import say
from posttrain.models.checkpoints.files import Checkpoint, settle
from posttrain.runs.artifact import Artifact
from posttrain.runs.files import copy_own
from posttrain.runs.manifest import CARD

OF_MODEL = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}  # --dtype -> merge's --as


def plain_model(artifact: Artifact, out: Path, dtype: str | None, max_kl: float) -> None:
    """Into the new directory `out`: merged and checked as `posttrain merge` does it, or a copy of what is a whole model already.
    dtype: of OF_MODEL; None: its own."""
    if artifact.kind == "adapter":
        merge_run(Path(artifact.name), out, max_kl, form=OF_MODEL[dtype] if dtype else "plain")
        return
    out.mkdir(exist_ok=True)
    copy_result(artifact, out)
    if dtype:
        _cast(out, FORMS[OF_MODEL[dtype]])


def _cast(directory: Path, form: str) -> None:
    """Its weights in another dtype, in place."""
    for file, tensors in list(Checkpoint(directory).shards()):
        cast = {name: t.to(getattr(torch, form)) if t.is_floating_point() else t for name, t in tensors.items()}
        save_file(cast, file, metadata={"format": "pt"})
    settle(directory, False, form)


def copy_result(artifact: Artifact, out: Path) -> None:
    """The result's files that the manifest lists, checked first."""
    listed = {Path(name).name for name in artifact.weight_files}
    weights = artifact.verified().weights
    if left := copy_own((file for file in weights.iterdir() if file.is_file()), weights, out, listed | {CARD}):
        say(f"{weights}: {', '.join(left)} left out: links to elsewhere, or files that its manifest does not list")
