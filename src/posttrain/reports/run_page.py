"""The page of a run: what it came to, its curves, samples, data, where it comes from, and what it took."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.metrics import metric, rounded, show, title
from posttrain.reports.curves import run_curves, speed_curves
from posttrain.reports.pages import REFRESH, live_note, page_link, read_samples, render, run_name
from posttrain.reports.run_records import Record, as_written, before_and_after, compare, duration, own_result, read_record
from posttrain.reports.sample_grids import sample_grids
from posttrain.reports.stage_plots import stage_figures
from posttrain.runs.files import PAGE, write_text
from posttrain.runs.manifest import DataRecord, Manifest, is_finished, read_manifest
from posttrain.runs.status import Standing, last_change, read_status, standing

_COUNTS = (
    "rows",
    "pictures",
    "views",
    "tokens",
    "trained_tokens",
    "share",
    "truncated",
    "untrained",
    "border_tokens",
    "shape",
    "fingerprint",
)


def run_page(run_dir: Path) -> Path:
    """Write report.html of a run, finished or under way. Raises UserError when `run_dir` is no run, or a damaged one."""
    write_text(run_dir / PAGE, run_html(run_dir))
    return run_dir / PAGE


def run_html(run_dir: Path) -> str:
    """The page that is to be in `run_dir`."""
    with as_written(run_dir):
        return _html(read_record(run_dir))


def _html(record: Record) -> str:
    directory, config, manifest = record.dir, record.config, record.manifest
    page, stands = directory / PAGE, standing(directory)
    curves, speed = stage_figures(record) + run_curves(record), speed_curves(record)
    changes = before_and_after(record.metrics, record.held_out_rows)
    named = [c.name for c in changes] + [n for line in record.history for n in line if n.startswith("train/")]
    return render(
        "run.html",
        title=f"{config['stage']} {run_name(directory)}",
        kicker=f"{config['stage']} run",
        heading=run_name(directory),
        state=stands.state,
        why=stands.why,
        live=_live(record, stands),
        lead=f"{config['model']['name']}, {method_of(config)}, on {_data_of(config['data'])}",
        tiles=_tiles(record),
        changes=changes,
        paired=any(change.between for change in changes),
        curves=curves,
        **_data_table(manifest),
        lineage=_lineage(record, page),
        alarms=manifest.alarms if manifest else (),
        samples=read_samples(directory),
        pictures=sample_grids(directory),
        speed=speed,
        costs=cost_rows(record),
        meanings=_meanings(named),
        particulars=_particulars(record),
        config=yaml.safe_dump(config, sort_keys=False),
    )


def _live(record: Record, stands: Standing) -> dict[str, Any] | None:
    """Of a run that goes on: when it was written, how often it is, when to look again."""
    if stands.state != "running":
        return None
    steps = [line["step"] for line in record.history if "train/loss" in line]
    status = read_status(record.dir)
    made = steps[-1] - status.start if steps and status else 0
    every = (
        (last_change(record.dir) - status.began) / made * (steps[-1] - steps[-2]) if made > 0 and len(steps) > 1 and status else 0
    )
    return live_note(max(every, REFRESH))


def method_of(config: dict[str, Any]) -> str:
    """What is trained, over what, in a few words."""
    peft, quant = config["peft"]["method"], config["quant"]["method"]
    return ("all weights" if peft == "none" else peft) + (f" over {quant}" if quant != "none" else "")


def _meanings(names: list[str]) -> list[tuple[str, str, str]]:
    """Title, name and meaning of each figure, once."""
    found = {name: metric(name) for name in dict.fromkeys(names)}
    return [(title(name), name, each.meaning) for name, each in found.items() if each.meaning]


def _data_of(data: dict[str, Any]) -> str:
    """The training data in a few words: a path, or the names of a mixture's sources."""
    return data.get("path") or data.get("instance_dir") or "a mixture of " + ", ".join(data.get("sources") or ())


def _tiles(record: Record) -> list[dict[str, str]]:
    tiles: list[dict[str, str]] = []
    metrics, manifest = record.metrics, record.manifest
    if own := own_result(record):
        tiles.append(_tile(own.title, own.after, own.text, own.before, own.verdict))
    if "forgetting/percent" in metrics:
        general = compare("general/loss", metrics["general/loss_before"], metrics["general/loss"])
        value = show("forgetting/percent", metrics["forgetting/percent"])
        tiles.append(_tile("forgetting", value, f"loss {general.before} → {general.after}"))
    return [*tiles, *(_costs(manifest) if manifest else _progress(record))]


def _tile(what: str, value: str, more: str, start: str = "", verdict: str = "") -> dict[str, str]:
    return {"what": what, "start": start, "value": value, "more": more, "verdict": verdict}


def _progress(record: Record) -> list[dict[str, str]]:
    """Of a run that is not done: how far it is, when it will be there, and its newest figures."""
    status = read_status(record.dir)
    done = record.history[-1]["step"] if record.history else 0
    planned = (status.steps if status else 0) or record.config["train"]["max_steps"]
    tiles = [_tile("step", f"{done:,}", f"of {planned:,}" if planned else "so far")]
    left = status.left(done, last_change(record.dir)) if status and status.state == "running" else None
    if left is not None:
        tiles.append(
            _tile("time left", duration(left), f"done about {time.strftime('%H:%M', time.localtime(time.time() + left))}")
        )
    newest = {name: value for line in record.history for name, value in line.items()}
    if "train/loss" in newest:
        tiles.append(_tile("loss", show("loss", newest["train/loss"]), "of the last logged steps"))
    for name in ("tokens_per_second", "images_per_second"):
        if f"train/{name}" in newest:
            tiles.append(_tile("speed", f"{rounded(newest[f'train/{name}'])} {metric(name).unit}", ""))
    return tiles


def _costs(manifest: Manifest) -> list[dict[str, str]]:
    size, unit = manifest.amount
    rate = size / manifest.seconds if manifest.seconds else 0.0
    tiles = [
        _tile(unit, f"{size:,}", f"in {manifest.steps:,} steps"),
        _tile("training time", duration(manifest.seconds), f"{rounded(rate)} {unit}/s on {manifest.device}"),
    ]
    if count := manifest.trainable:
        share = f"{count.trained / count.total:.2%} of {_short(count.total)}" if count.total else ""
        tiles.insert(0, _tile("trained parameters", _short(count.trained), share))
    return tiles


def cost_rows(record: Record) -> list[tuple[str, str]]:
    """What a run took: time, speed, memory."""
    manifest = record.manifest
    if manifest is None:
        return []
    size, unit = manifest.amount
    rows = [("training time", duration(manifest.seconds)), ("processes", str(manifest.processes)), ("device", manifest.device)]
    if manifest.seconds and manifest.steps:
        rows.insert(1, ("a step", f"{rounded(manifest.seconds / manifest.steps)} s"))
        rows.insert(2, ("speed", f"{rounded(size / manifest.seconds)} {unit}/s"))
    if manifest.peak_memory_bytes:
        rows.append(("most memory at once", f"{manifest.peak_memory_bytes / 2**30:.2f} GiB a process"))
    if manifest.halved:
        rows.append(("out of memory", f"micro-batches halved at step {', '.join(map(str, manifest.halved))}"))
    return rows


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _data_table(manifest: Manifest | None) -> dict[str, Any]:
    if manifest is None:
        return {"data": [], "data_columns": []}
    parts: list[tuple[str, DataRecord]] = [("train", source) for source in manifest.data]
    parts += [("held out", manifest.held_out)] if manifest.held_out else []
    sources = [(part, record.to_dict()) for part, record in parts]
    columns = [c for c in _COUNTS if any(c in source for _, source in sources)]
    rows = [
        {
            "name": source["source"],
            "part": part,
            "cells": [_count(c, source[c]) if c in source else "" for c in columns],
        }
        for part, source in sources
    ]
    return {"data": rows, "data_columns": columns}


def _count(column: str, value: Any) -> str:
    if column == "share":
        return f"{value:.0%}"
    if column == "fingerprint":
        return str(value)[:12]
    return f"{value:,}" if isinstance(value, int) else str(value)


def _lineage(record: Record, page: Path) -> list[dict[str, str]]:
    """From the base to this run, along the parents that were each run's start."""
    nodes = [{"name": run_name(record.dir), "href": "", "what": f"{record.config['stage']}, this run"}]
    manifest = record.manifest
    while manifest and (parents := [p for p in manifest.parents if p.role == "init"]) and len(nodes) < 50:
        directory = Path(parents[0].path)
        manifest = read_manifest(directory) if is_finished(directory) else None
        what = f"{manifest.stage}, {manifest.steps:,} steps" if manifest else "no longer there"
        nodes.append({"name": directory.name, "href": page_link(directory, page), "what": what})
    base = manifest.base.name if manifest else "" if record.manifest else record.config["model"]["name"]
    nodes += [{"name": Path(base).name if Path(base).is_absolute() else base, "href": "", "what": "base model"}] if base else []
    return nodes[::-1]


def _particulars(record: Record) -> list[tuple[str, list[tuple[str, Any]]]]:
    manifest = record.manifest
    if manifest is None:
        return []
    result: list[tuple[str, Any]] = [("dtype", manifest.dtype), ("seed", manifest.seed), ("device", manifest.device)]
    if ended := manifest.ended:
        result += [("ended", f"at step {ended.step}, with the weights of step {ended.back_to}")]
    if best := manifest.best:
        result += [(f"best {best.metric}", f"{best.value} at step {best.step}")]
    result += [(f"weights {key}", value) for key, value in manifest.weights.to_dict().items()]
    result += [(f"base {key}", value) for key, value in manifest.base.to_dict().items() if value]
    result += [(f"quant {key}", value) for key, value in manifest.quant.to_dict().items()]
    result += [(f"parent, {p.role}", f"{p.path} ({p.digest[:12]})") for p in manifest.parents]
    result += [("config digest", manifest.config_digest)]
    result += [(f"code {key}", value) for key, value in manifest.code.to_dict().items() if value is not None]
    return [("Result", result), ("Versions", list(manifest.versions.items()))]
