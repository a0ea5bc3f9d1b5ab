"""The page of a sweep: which settings were best, as a table and, for one or two swept numbers, a plot."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.metrics import show, title
from posttrain.reports.compare_page import measured_on
from posttrain.reports.forgetting import KEY, Choice, choice_figure, choices, describe
from posttrain.reports.pages import HEAT, live_note, metric_grid, overlays, page_link, render, run_name
from posttrain.reports.plots import Curve, Figure, line_figure
from posttrain.reports.run_records import Record, read_record, summary_columns
from posttrain.runs.files import write_text

METRIC = "eval/loss"
# Settings that change what the held-out loss is, not only how low it gets.
_OTHER_LOSS = ("dpo.", "data", "model", "eval.", "train.max_length", "init")


@dataclass(frozen=True)
class Job:
    """One job of a sweep; record: None when it left no config."""

    overrides: dict[str, str]
    status: str
    dir: Path
    metrics: dict[str, float]
    error: str
    record: Record | None

    @property
    def loss(self) -> float:
        """The figure by which jobs are ranked; infinite where it is missing, not a number, or of a job that goes on."""
        value = self.metrics[METRIC] if METRIC in self.metrics and self.status == "done" else float("inf")
        return value if value == value else float("inf")


def sweep_page(rows: list[dict[str, Any]], path: Path, state: str | None = None, every: float = 0) -> Path:
    """Write `path` and return it.

    rows: {overrides: {key: value} or ['key=value'], status, dir, metrics}, and where it failed perhaps `error`, one line; metrics
    None: as the job's directory has them. state: of the sweep, None where its jobs say it. every: seconds until it is written
    again.
    """
    write_text(path, sweep_html(rows, path, state, every))
    return path


def sweep_html(rows: list[dict[str, Any]], path: Path, state: str | None = None, every: float = 0) -> str:
    """The page that is to be at `path`; see `sweep_page`."""
    jobs = sorted((_job(row, path) for row in rows), key=lambda job: job.loss)
    state = state or sweep_state([job.status for job in jobs])
    keys = _swept(jobs)
    done = [job for job in jobs if job.loss < float("inf")]
    columns = summary_columns([job.metrics for job in jobs])
    caution = [key for key in keys if key.startswith(_OTHER_LOSS)]
    chosen = _choices(done) if KEY in keys else []
    ended = [job.record for job in jobs if job.record and job.record.manifest]  # of the others it is not known yet
    apart = [name for name in columns if len({measured_on(record, name) for record in ended}) > 1]
    return render(
        "sweep.html",
        title=f"sweep {run_name(path.parent)}",
        kicker="sweep",
        heading=run_name(path.parent),
        state=state,
        live=live_note(every) if state == "running" else None,
        lead=_lead(jobs, done, keys, METRIC not in apart),
        metric_name=METRIC,
        ranked=METRIC not in apart,
        keys=keys,
        columns=columns,
        heat=_heat(done, keys) if len(keys) == 2 else None,
        plot=_plot(done, keys[0]) if len(keys) == 1 else None,
        choice=choice_figure(chosen),
        chosen=describe(chosen),
        jobs=_table(jobs, keys, columns, apart, path),
        caution=_caution(caution, apart),
        curves=overlays([(_label(job, keys), job.record) for job in jobs if job.record]),
    )


def sweep_state(of_jobs: list[str]) -> str:
    """Where a sweep stands, by the states of its jobs: one that has failed does not make the others' work nothing."""
    for state in ("running", "stopped"):
        if state in of_jobs:
            return state
    if "to do" in of_jobs:
        return "unfinished"
    return "failed" if of_jobs and all(state == "failed" for state in of_jobs) else "done"


def _caution(changing: list[str], apart: list[str]) -> str:
    said: list[str] = []
    if apart:
        names = ", ".join(map(title, apart))
        said.append(f"Not held against each other, as the jobs were measured on different rows: {names}.")
    if changing:
        said.append(f"{title(METRIC)} is not the same quantity in all jobs: {', '.join(changing)} changes what is measured.")
    return " ".join(said)


def _choices(done: list[Job]) -> list[Choice]:
    return choices([(job.overrides[KEY], job.metrics, _weight(job)) for job in done if KEY in job.overrides])


def _weight(job: Job) -> float:
    return float((job.record.config if job.record else {}).get("forgetting", {}).get("weight", 1.0))


def alpha_star(rows: list[dict[str, Any]], path: Path) -> str:
    """What a sweep over data.alpha has chosen, in words; empty for other sweeps."""
    done = [job for job in (_job(row, path) for row in rows) if job.loss < float("inf")]
    return describe(_choices(done)) if KEY in _swept(done) else ""


def _job(row: dict[str, Any], path: Path) -> Job:
    listed: dict[str, Any] | list[str] = row["overrides"]
    overrides = listed if isinstance(listed, dict) else {line.partition("=")[0]: line.partition("=")[2] for line in listed}
    directory = Path(row["dir"])
    directory = directory if directory.is_dir() else path.parent / directory
    record = read_record(directory) if (directory / "config.yaml").exists() else None
    error = "" if row["status"] != "failed" else row["error"] if "error" in row else _last_line(directory / "job.log")
    settings = {key.lstrip("+"): str(value) for key, value in overrides.items()}
    metrics = row["metrics"] if row["metrics"] is not None else record.metrics if record else {}
    return Job(settings, row["status"], directory, metrics, error, record)


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.exists() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "failed without a message")


def _swept(jobs: list[Job]) -> list[str]:
    """Keys whose value is not the same in all jobs."""
    keys = dict.fromkeys(key for job in jobs for key in job.overrides)
    return [key for key in keys if len({job.overrides.get(key) for job in jobs}) > 1]


def _lead(jobs: list[Job], done: list[Job], keys: list[str], is_ranked: bool) -> str:
    failed = sum(job.status == "failed" for job in jobs)
    count = f"{len(jobs)} jobs" + (f", {failed} failed" if failed else "")
    if not done:
        return count
    fixed = [f"{key}={value}" for key, value in jobs[0].overrides.items() if key not in keys]
    best = f"; best: {_label(done[0], keys)} with {METRIC} {show(METRIC, done[0].loss)}" if is_ranked else ""
    return f"{count}{best}" + (f"; all with {' '.join(fixed)}" if fixed else "")


def _label(job: Job, keys: list[str]) -> str:
    parts = [f"{key.rsplit('.', 1)[-1]} {job.overrides[key]}" for key in keys if key in job.overrides]
    return ", ".join(parts) or run_name(job.dir)


def _table(jobs: list[Job], keys: list[str], columns: list[str], apart: list[str], path: Path) -> list[dict[str, Any]]:
    are_done = all(job.status == "done" for job in jobs if job.metrics)
    rated = [name for name in columns if name not in apart] if are_done else []  # others are of fewer steps
    grid = metric_grid([job.metrics for job in jobs], columns, rated, [job.record for job in jobs])
    return [
        {
            "settings": [job.overrides.get(key, "—") for key in keys],
            "status": job.status,
            "cells": cells,
            "error": job.error,
            "best": not i and job.loss < float("inf") and METRIC not in apart,
            "href": page_link(job.dir, path),
            "name": run_name(job.dir),
        }
        for i, (job, cells) in enumerate(zip(jobs, grid, strict=True))
    ]


def _numbers(jobs: list[Job], key: str) -> list[float] | None:
    """Distinct values of a swept key in order; None when one of them is no number."""
    try:
        return sorted({float(job.overrides[key]) for job in jobs})
    except (ValueError, KeyError):
        return None


def _heat(done: list[Job], keys: list[str]) -> dict[str, Any] | None:
    """A cell for every pair of values; the best of jobs that share one. Needs numbers on both axes."""
    down, across = _numbers(done, keys[0]), _numbers(done, keys[1])
    if not down or not across:
        return None
    best: dict[tuple[float, float], float] = {}
    for job in reversed(done):  # from worst to best
        best[float(job.overrides[keys[0]]), float(job.overrides[keys[1]])] = job.loss
    order = sorted(set(best.values()), reverse=True)

    def cell(row: float, column: float) -> dict[str, Any]:
        if (row, column) not in best:
            return {"text": "—", "heat": 0, "best": False}
        value = best[row, column]
        return {
            "text": show(METRIC, value),
            "heat": round(HEAT * (order.index(value) + 1) / len(order)),
            "best": value == order[-1],
        }

    rows = [(f"{row:g}", [cell(row, column) for column in across]) for row in down]
    return {"row_key": keys[0], "column_key": keys[1], "columns": [f"{c:g}" for c in across], "rows": rows}


def _plot(done: list[Job], key: str) -> Figure | None:
    x = _numbers(done, key)
    if not x or len(x) < 2:
        return None
    points = sorted((float(job.overrides[key]), job.loss) for job in done)
    curve = Curve(METRIC, [p[0] for p in points], [p[1] for p in points], style="points")
    return line_figure("Lower is better", [curve], x_label=key, x_ticks=x)
