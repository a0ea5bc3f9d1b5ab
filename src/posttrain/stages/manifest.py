"""What a finished run says of itself: its manifest, and the table at the end."""

from __future__ import annotations

import resource
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from rich.table import Table

from posttrain.config.metrics import show, title
from posttrain.config.schema import Stage
from posttrain.console import console, is_main, say
from posttrain.evaluation.calibration import SUSPICIOUS
from posttrain.runs.directory import Run
from posttrain.runs.manifest import Manifest
from posttrain.stages.steps import Outcome


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that was allocated on a CUDA device, else the most that this process had resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def common_record(cfg: Stage, outcome: Outcome, accelerator: Accelerator) -> dict[str, Any]:
    """What a manifest says of how a run went, whatever its stage."""
    state = outcome.state
    record = {
        "seconds": round(state.seconds, 2),
        "metrics": outcome.metrics,
        "seed": cfg.train.seed,
        "device": str(accelerator.device),
        "peak_memory_bytes": peak_memory(accelerator.device),
        "processes": accelerator.num_processes,
        "changes": state.changes,
        "batches_left_out": state.left_out,
        "halved": state.halved,
        "identity": state.identity,
        "made_with": state.made_with,
    }
    record |= {"ended": state.ended} if state.ended else {}
    return record | ({"best": {"metric": cfg.train.judged_by, **state.best}} if state.best else {})


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
        table.add_row(title(name), show(name, metrics[f"{name}_before"]), show(name, metrics[name]))
    if is_main() and table.row_count:
        console.print(table)
    if "forgetting/percent" in metrics:
        say(f"forgetting: {metrics['forgetting/percent']:+.2f} % on general text")
    if "eval/accuracy_low" in metrics:
        _say_of_scores(metrics)
    size, unit = manifest.amount
    say(f"{size:,} {unit} in {manifest.seconds:.0f} s")
    say(f"result {run.dir / manifest.weights.path}")
    say(f"report {page}")
