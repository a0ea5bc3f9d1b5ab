"""What a finished run says of itself: its manifest, and the table at the end."""

from __future__ import annotations

import resource
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from posttrain.config.schema import LanguageStage, Stage
from posttrain.console import console, is_main, say
from posttrain.data.chat.encoder import template_hash
from posttrain.evaluation.calibration import SUSPICIOUS
from posttrain.models.peft.export import final_ranks
from posttrain.runs.directory import Run
from posttrain.runs.manifest import Manifest
from posttrain.stages.language.build import PreparedData, TrainableModel


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, else the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measured(cfg: Stage, state: dict[str, Any], metrics: dict[str, float], acc: Accelerator) -> dict[str, Any]:
    """What a manifest says of how a run went, whatever its stage."""
    return {
        "seconds": round(state["seconds"], 2),
        "metrics": metrics,
        "seed": cfg.train.seed,
        "device": str(acc.device),
        "peak_memory_bytes": peak_memory(acc.device),
        "processes": acc.num_processes,
    }


def manifest_of(
    cfg: LanguageStage,
    built: TrainableModel,
    inputs: PreparedData,
    kind: str,
    state: dict[str, Any],
    metrics: dict[str, float],
    acc: Accelerator,
) -> dict[str, Any]:
    """What manifest.json says of a run, but for what every manifest has."""
    start, base = inputs.start, inputs.base
    steps = state.get("ended", {}).get("back_to", inputs.order.num_steps)
    return {
        "stage": cfg.stage,  # type: ignore[attr-defined]
        "parents": start.parents,
        "base": {"name": base.name, "path": str(base.path), "revision": base.revision, "digest": base.digest},
        "weights": {"kind": kind, "path": kind},
        "tokenizer": {"hash": inputs.tokenizer_hash, "chat_template": template_hash(inputs.tokenizer)},
        "dtype": str(built.dtype).removeprefix("torch."),
        "quant": cfg.quant.model_dump(),
        "peft": cfg.peft.model_dump() | ({"ranks": ranks} if (ranks := final_ranks(built.module.model)) else {}),
        "chain": inputs.start.mode,
        "trainable": {"trained": built.trained, "total": built.total},
        "data": inputs.data.record(inputs.order.until(steps)),
        "held_out": asdict(inputs.data.held_out_stats),
        "steps": steps,
        "tokens": state["tokens"],
        **measured(cfg, state, metrics, acc),
    }


def _say_of_scores(metrics: dict[str, float]) -> None:
    """A reward model's accuracy with its interval, and whether it might be counting words."""
    low, high, r = metrics["eval/accuracy_low"], metrics["eval/accuracy_high"], metrics["eval/length_correlation"]
    say(f"held-out accuracy {metrics['eval/accuracy']:.1%} (95 % interval {low:.1%} to {high:.1%})")
    longer = "longer" if r > 0 else "shorter"
    warning = f": a policy may get reward for {longer} answers alone" if abs(r) >= SUSPICIOUS else ""
    say(f"score and length of the answer correlate with r = {r:+.2f}{warning}")


def show_outcome(run: Run, manifest: Manifest, page: Path) -> None:
    """The end of a run as a table: what was measured, before and after."""
    metrics = manifest.metrics
    table = Table("held out", "before", "after")
    for name in sorted(n for n in metrics if f"{n}_before" in metrics):
        table.add_row(name, f"{metrics[f'{name}_before']:.4f}", f"{metrics[name]:.4f}")
    if is_main():
        console.print(table)
    if "forgetting/percent" in metrics:
        say(f"forgetting: {metrics['forgetting/percent']:+.2f} % on general text")
    if "eval/accuracy_low" in metrics:
        _say_of_scores(metrics)
    size, unit = manifest.amount
    say(f"{size:,} {unit} in {manifest.seconds:.0f} s")
    say(f"result {run.dir / manifest.weights.path}")
    say(f"report {page}")
