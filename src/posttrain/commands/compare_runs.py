"""Do two finished runs agree? Weights, optimizer, order of the data and figures, bit for bit or by how much not."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from posttrain.runs.artifact import open_artifact
from posttrain.training.checkpoint import newest_checkpoint


@dataclass(frozen=True)
class RunComparison:
    """One part of two runs. text: how much of it agrees, or by how much it does not."""

    part: str
    same: bool
    text: str


def compare_runs(first: Path, second: Path) -> list[RunComparison]:
    """Raises UserError where one is not finished, or has no checkpoint that is whole."""
    artifacts = [open_artifact(run, "run") for run in (first, second)]
    manifests = [artifact.finished() for artifact in artifacts]
    weights = [_tensors(artifact.weights) for artifact in artifacts]
    checkpoints = [newest_checkpoint(run / "checkpoints")[0] for run in (first, second)]
    found = [tensors_agree("weights", *weights)]
    if all(checkpoints):
        a, b = checkpoints
        assert a and b
        found.append(tensors_agree("optimizer", a.optimizer, b.optimizer))
        same = a.state.get("drawn") == b.state.get("drawn")
        found.append(
            RunComparison("data order", same, "the same rows in the same order" if same else "other rows, or another order")
        )
    return [*found, _figures_agree(*(manifest.metrics for manifest in manifests))]


def _tensors(folder: Path) -> dict[str, Tensor]:
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{name}": value for file in files for name, value in load_file(file).items()}


def tensors_agree(part: str, first: dict[str, Tensor], second: dict[str, Tensor]) -> RunComparison:
    """Compare two sets of tensors by names, shapes and bits."""
    odd = sorted(set(first) ^ set(second)) or [name for name, value in first.items() if value.shape != second[name].shape]
    if odd:
        return RunComparison(part, False, f"{odd[0]} (and {len(odd) - 1} more) is not in both, or of another shape")
    unequal = [name for name, value in first.items() if not torch.equal(value, second[name])]
    if not unequal:
        return RunComparison(part, True, f"bit for bit the same ({len(first)} tensors)")
    furthest = {name: float((first[name].double() - second[name].double()).abs().max()) for name in unequal}
    name = max(furthest, key=lambda name: furthest[name])
    return RunComparison(part, False, f"{len(unequal)} of {len(first)} tensors differ, by up to {furthest[name]:.3g} ({name})")


def _figures_agree(first: dict[str, float], second: dict[str, float]) -> RunComparison:
    differing = {name: (first.get(name), second.get(name)) for name in first | second if first.get(name) != second.get(name)}
    if not differing:
        return RunComparison("figures", True, f"the same ({len(first)} of them)")
    name, (before, now) = next(iter(differing.items()))
    return RunComparison("figures", False, f"{len(differing)} of {len(first)} differ: {name} {before} and {now}")
