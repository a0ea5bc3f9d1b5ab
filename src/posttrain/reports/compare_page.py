"""Runs side by side: figures, where they were measured on the same rows; curves, samples, and the settings that differ."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.reports.pages import live_note, metric_grid, overlays, page_link, read_samples, render
from posttrain.reports.run_records import Record, as_written, duration, plain, read_record, summary_columns
from posttrain.runs.files import write_text
from posttrain.runs.identity import flatten
from posttrain.runs.status import standing

SAMPLES = 8  # prompts whose answers are put side by side


def compare_page(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write runs side by side to `path`: metrics, curves, and the config keys in which they differ; returns `path`."""
    write_text(path, compare_html(run_dirs, path))
    return path


def compare_html(run_dirs: Sequence[Path], path: Path, live: bool = False) -> str:
    """The page that is to be at `path`. live: it is made anew whenever it is looked at. Raises UserError for what is no run, or a
    damaged one."""
    with as_written(Path(run_dirs[0]) if len(run_dirs) == 1 else path):
        return _html([read_record(Path(d)) for d in run_dirs], path, live)


def _html(records: list[Record], path: Path, live: bool) -> str:
    goes_on = live and any(standing(record.dir).state == "running" for record in records)
    columns = summary_columns([r.metrics for r in records])
    stages = list(dict.fromkeys(r.config["stage"] for r in records))
    alike = {name for name in columns if len({measured_on(r, name) for r in records if name in r.metrics}) <= 1}
    grid = metric_grid([r.metrics for r in records], columns, [name for name in columns if name in alike], records)
    flat = [flatten({k: v for k, v in r.config.items() if k != "run"}) for r in records]
    keys = dict.fromkeys(key for f in flat for key in f)
    differing = [key for key in keys if len({str(f.get(key)) for f in flat}) > 1]
    return render(
        "compare.html",
        live=live_note() if goes_on else None,
        title="runs compared",
        kicker="comparison",
        heading=f"{len(records)} runs",
        state="",
        lead=", ".join(map(_long_name, records)),
        columns=columns,
        runs=[_row(record, cells, path) for record, cells in zip(records, grid, strict=True)],
        curves=[f for s in stages for f in overlays([(_long_name(r), r) for r in records if r.config["stage"] == s])],
        samples=_samples(records),
        differences=[(key, [plain(f[key]) if key in f else "—" for f in flat]) for key in differing],
        apart=[name for name in columns if name not in alike],
    )


def measured_on(record: Record, name: str) -> str:
    """What a figure was measured on, as far as a run tells: two that say the same can be held against each other."""
    manifest, config = record.manifest, record.config
    tokenizer = manifest.tokenizer.hash if manifest and manifest.tokenizer else ""
    if not name.startswith("eval/"):
        group = name.partition("/")[0]
        sets: dict[str, Any] = config.get("eval", {}).get("sets") or {}
        return json.dumps([group, sets.get(group), tokenizer], default=str)
    if manifest and manifest.held_out and manifest.held_out.fingerprint:
        return json.dumps([config["stage"], manifest.held_out.fingerprint, manifest.held_out.to_dict().get("rows"), tokenizer])
    return json.dumps([config["stage"], config["data"], config["model"].get("name")], default=str)


def _row(record: Record, cells: list[Any], path: Path) -> dict[str, Any]:
    size, unit = record.manifest.amount if record.manifest else (0, "tokens")
    return {
        "name": _long_name(record),
        "href": page_link(record.dir, path),
        "stage": record.config["stage"],
        "state": standing(record.dir).state,
        "cells": cells,
        "size": f"{size:,} {unit}" if size else "",
        "time": duration(record.manifest.seconds) if record.manifest else "",
    }


def _samples(records: list[Record]) -> list[dict[str, Any]]:
    """Each run's last answer to the prompts that several of them have answered."""
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        for sample in read_samples(record.dir):
            if answers := sample["answers"]:
                found.setdefault(sample["prompt"], []).append(answers[-1] | {"label": _long_name(record)})
    shared = [{"prompt": prompt, "answers": answers} for prompt, answers in found.items() if len(answers) > 1]
    return shared[:SAMPLES]


def _long_name(record: Record) -> str:
    return "/".join(record.dir.resolve().parts[-2:])
