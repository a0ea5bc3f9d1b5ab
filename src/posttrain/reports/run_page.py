"""Self-contained HTML pages of a run, a sweep, a recipe, and runs compared. No scripts, nothing from the network."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from posttrain.config.directions import ANSWERS
from posttrain.reports.forgetting import forgetting_matrix
from posttrain.reports.pages import best_of, metric_grid, overlays, page_link, run_name, write_page
from posttrain.reports.plots import Curve, Figure, line_figure
from posttrain.reports.run_records import (
    Record,
    as_written,
    before_and_after,
    chain_table,
    compare,
    duration,
    own_result,
    plain,
    read_record,
    show,
    summary_columns,
)
from posttrain.reports.sample_grids import sample_grids
from posttrain.reports.stage_plots import stage_figures
from posttrain.reports.sweep_page import sweep_page
from posttrain.runs.identity import flatten
from posttrain.runs.manifest import DataRecord, Manifest, is_finished, read_manifest

__all__ = ["compare_page", "recipe_page", "run_page", "sweep_page"]


# Title, and the metrics drawn together: train/<name> as lines, eval/<name> as dots.
_CURVES = (
    ("Loss", ("loss",)),
    ("Loss on pictures of the individual and of the prior", ("loss_instance", "loss_prior")),
    ("Accuracy of pairs", ("accuracy",)),
    ("Reward margin", ("margin",)),
    ("Implicit rewards", ("reward_chosen", "reward_rejected")),
    ("Log-probability of answers", ("logp_chosen", "logp_rejected")),
    ("Scores", ("score_chosen", "score_rejected")),
    ("Reward", ("reward",)),
    ("KL to the start, nats an answer", ("kl",)),
    ("Gold check", ("gold",)),
    ("Entropy, nats a token", ("entropy",)),
    ("Length of answers, tokens", ("length",)),
    ("Share of answers that end", ("ended",)),
    ("Learning rate", ("lr",)),
    ("Gradient norm, before clipping", ("grad_norm",)),
    ("Tokens per second", ("tokens_per_second",)),
    ("Images per second", ("images_per_second",)),
)
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
    with as_written(run_dir):
        return _run_page(run_dir)


def _run_page(run_dir: Path) -> Path:
    record = read_record(run_dir)
    page = run_dir / "report.html"
    config, manifest = record.config, record.manifest
    samples = run_dir / "samples.json"
    peft, quant = config["peft"]["method"], config["quant"]["method"]
    method = ("all weights" if peft == "none" else peft) + (f" over {quant}" if quant != "none" else "")
    return write_page(
        page,
        "run.html",
        title=f"{config['stage']} {run_name(run_dir)}",
        kicker=f"{config['stage']} run",
        heading=run_name(run_dir),
        state="done" if manifest else "running",
        lead=f"{config['model']['name']}, {method}, on {_data_of(config['data'])}",
        tiles=_tiles(record),
        changes=before_and_after(record.metrics),
        curves=stage_figures(record) + _run_curves(record),
        **_data_table(manifest),
        lineage=_lineage(record, page),
        alarms=manifest.alarms if manifest else (),
        samples=json.loads(samples.read_text(encoding="utf-8")) if samples.exists() else [],
        pictures=sample_grids(run_dir),
        particulars=_particulars(record),
        config=yaml.safe_dump(config, sort_keys=False),
    )


def _data_of(data: dict[str, Any]) -> str:
    """The training data in a few words: a path, or the names of a mixture's sources."""
    return data.get("path") or data.get("instance_dir") or "a mixture of " + ", ".join(data.get("sources") or ())


def recipe_page(steps: list[dict[str, Any]], path: Path) -> Path:
    """Write `path` and return it. steps: {name, stage, dir, status, why, seconds}; one yet to run has no figures."""
    records = {s["name"]: read_record(Path(s["dir"])) for s in steps if (Path(s["dir"]) / "config.yaml").exists()}
    finished = [(name, record) for name, record in records.items() if record.manifest]
    columns, rows = chain_table(finished)
    best = {c: best_of(c, [row.values.get(c) for row in rows]) for c in columns if c != "forgetting/percent"}
    table = [
        {"label": row.label, "cells": [vars(row.change(c)) | {"best": best.get(c) == i} for c in columns]}
        for i, row in enumerate(rows)
    ]
    domains, matrix = forgetting_matrix(rows)
    most = max((abs(value) for _, values in matrix for value in values if value is not None), default=0.0) or 1.0
    listed = [_step(s, records.get(s["name"]), path) for s in steps]
    curves = [figure for name, record in records.items() if (figure := _loss_figure(name, record))]
    failed = [s["name"] for s in steps if s["status"] == "failed"]
    ended = all(s["status"] in ("done", "skipped") for s in steps)
    return write_page(
        path,
        "recipe.html",
        title=f"recipe {run_name(path.parent)}",
        kicker="recipe",
        heading=run_name(path.parent),
        state="failed" if failed else "done" if ended else "running",
        lead=" → ".join(s["name"] for s in steps),
        columns=columns,
        rows=table,
        domains=domains,
        matrix=[(label, [_shaded(value, most) for value in values]) for label, values in matrix],
        steps=listed,
        curves=curves,
    )


def _shaded(value: float | None, most: float) -> dict[str, float] | None:
    if value is None:
        return None
    return {"value": value, "heat": round(55 * max(value, 0) / most), "good": round(55 * max(-value, 0) / most)}


def compare_page(run_dirs: Sequence[Path], path: Path) -> Path:
    """Write runs side by side to `path`: metrics, curves, and the config keys in which they differ; returns `path`."""
    with as_written(Path(run_dirs[0]) if len(run_dirs) == 1 else path):
        return _compare_page(run_dirs, path)


def _compare_page(run_dirs: Sequence[Path], path: Path) -> Path:
    records = [read_record(Path(d)) for d in run_dirs]
    columns = summary_columns([r.metrics for r in records])
    stages = list(dict.fromkeys(r.config["stage"] for r in records))
    rated = [name for name in columns if len(stages) == 1 or not name.startswith("eval/")]
    grid = metric_grid([r.metrics for r in records], columns, rated)
    runs: list[dict[str, Any]] = []
    for record, cells in zip(records, grid, strict=True):
        size, unit = record.manifest.amount if record.manifest else (0, "tokens")
        runs.append(
            {
                "name": _long_name(record),
                "href": page_link(record.dir, path),
                "stage": record.config["stage"],
                "cells": cells,
                "size": f"{size:,} {unit}",
                "time": duration(record.manifest.seconds if record.manifest else 0.0),
            }
        )
    flat = [flatten({k: v for k, v in r.config.items() if k != "run"}) for r in records]
    keys = dict.fromkeys(key for f in flat for key in f)
    differing = [key for key in keys if len({str(f.get(key)) for f in flat}) > 1]
    return write_page(
        path,
        "compare.html",
        title="runs compared",
        kicker="comparison",
        heading=f"{len(records)} runs",
        state="",
        lead="",
        columns=columns,
        runs=runs,
        curves=[f for s in stages for f in overlays([(_long_name(r), r) for r in records if r.config["stage"] == s])],
        differences=[(key, [plain(f[key]) if key in f else "—" for f in flat]) for key in differing],
        caution="eval/ figures compare only between runs of one stage on the same held-out rows.",
    )


def _long_name(record: Record) -> str:
    return "/".join(record.dir.resolve().parts[-2:])


def _tiles(record: Record) -> list[dict[str, str]]:
    tiles: list[dict[str, str]] = []
    metrics, manifest = record.metrics, record.manifest
    if own := own_result(record):
        what = f"held-out {own.name.split('/')[1]}"
        tiles.append({"what": what, "start": own.before, "value": own.after, "more": own.text, "verdict": own.verdict})
    if "forgetting/percent" in metrics:
        general = compare("general/loss", metrics["general/loss_before"], metrics["general/loss"])
        value, more = (
            show("forgetting/percent", metrics["forgetting/percent"]),
            f"loss {general.before} → {general.after}",
        )
        tiles.append({"what": "forgetting", "start": "", "value": value, "more": more, "verdict": ""})
    if manifest is None:
        last = record.history[-1] if record.history else {"step": 0}
        planned = record.config["train"]["max_steps"]
        more = f"of {planned} steps" if planned else "steps so far"
        return [*tiles, {"what": "progress", "start": "", "value": f"{last['step']:,}", "more": more, "verdict": ""}]
    return tiles + [
        {"what": what, "start": "", "value": value, "more": more, "verdict": ""} for what, value, more in _costs(manifest)
    ]


def _costs(manifest: Manifest) -> list[tuple[str, str, str]]:
    """What, how much, and more on it."""
    size, unit = manifest.amount
    rate = size / manifest.seconds if manifest.seconds else 0.0
    found = [
        (unit, f"{size:,}", f"in {manifest.steps:,} steps"),
        ("training time", duration(manifest.seconds), f"{rate:,.3g} {unit}/s on {manifest.device}"),
    ]
    if count := manifest.trainable:
        share = f"{count.trained / count.total:.2%} of {_short(count.total)}" if count.total else ""
        found = [("trained parameters", _short(count.trained), share), *found]
    return found


def _short(count: float) -> str:
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return str(count)


def _run_curves(record: Record) -> list[Figure]:
    groups = [*_CURVES]
    known = {name for _, names in groups for name in names}
    seen = dict.fromkeys(n.removeprefix("train/") for line in record.history for n in line if n.startswith("train/"))
    groups += [(name.replace("_", " "), (name,)) for name in seen if name not in known]
    scores = dict.fromkeys(n for line in record.history for n in line if n.startswith(f"{ANSWERS}/"))
    figures = [_curve_figure(title, names, record) for title, names in groups]
    for name in scores:
        curve = Curve("held out", *record.series(name), color=2, style="points")
        figures.append(line_figure(f"Answers to held-out prompts: {name.partition('/')[2]}", [curve]))
    return [figure for figure in figures if figure]


def _curve_figure(title: str, names: tuple[str, ...], record: Record) -> Figure | None:
    curves: list[Curve] = []
    for i, name in enumerate(names, 1):
        label = name.rsplit("_", 1)[-1] if len(names) > 1 else "train"
        curves.append(Curve(label, *record.series(f"train/{name}"), color=i, smooth=name != "lr"))
        if len(names) == 1:
            curves.append(Curve("held out", *record.series(f"eval/{name}"), color=2, style="points"))
    return line_figure(title, curves)


def _loss_figure(title: str, record: Record) -> Figure | None:
    return _curve_figure(title, ("loss",), record)


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


def _step(step: dict[str, Any], record: Record | None, path: Path) -> dict[str, Any]:
    done = record.manifest if record else None
    seconds = step["seconds"] or (done.seconds if done else 0)
    return {
        **{key: step[key] for key in ("name", "stage", "status", "why")},
        "href": page_link(Path(step["dir"]), path),
        "steps": f"{done.steps:,}" if done else "",
        "size": "{:,} {}".format(*done.amount) if done else "",
        "time": duration(seconds) if seconds else "",
        "own": own_result(record) if record and done else None,
    }
