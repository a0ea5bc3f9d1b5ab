"""The page of a recipe: what the model knows after each step, what it forgot, and where the steps stand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.reports.curves import loss_figure
from posttrain.reports.forgetting import forgetting_matrix
from posttrain.reports.pages import HEAT, best_of, live_note, page_link, render, run_name
from posttrain.reports.run_records import Change, Record, chain_table, duration, own_result, read_record
from posttrain.runs.files import write_text


def recipe_page(steps: list[dict[str, Any]], path: Path, every: float = 0) -> Path:
    """Write `path` and return it. steps: {name, stage, dir, status, why, seconds}; one yet to run has no figures. every: seconds
    until it is written again."""
    write_text(path, recipe_html(steps, path, every))
    return path


def recipe_html(steps: list[dict[str, Any]], path: Path, every: float = 0) -> str:
    """The page that is to be at `path`; see `recipe_page`."""
    records = {s["name"]: read_record(Path(s["dir"])) for s in steps if (Path(s["dir"]) / "config.yaml").exists()}
    finished = [(name, record) for name, record in records.items() if record.manifest]
    columns, rows = chain_table(finished)
    best = {c: best_of(c, [row.values.get(c) for row in rows]) for c in columns if c != "forgetting/percent"}
    table = [
        {"label": row.label, "cells": [_cell(row.change(c), best.get(c) == i) for c in columns]} for i, row in enumerate(rows)
    ]
    domains, matrix = forgetting_matrix(rows)
    most = max([1.0, *(abs(value) for _, values in matrix for value in values if value is not None)])  # below 1 % it is pale
    state = recipe_state([s["status"] for s in steps])
    return render(
        "recipe.html",
        title=f"recipe {run_name(path.parent)}",
        kicker="recipe",
        heading=run_name(path.parent),
        state=state,
        live=live_note(every) if state == "running" else None,
        lead=" → ".join(s["name"] for s in steps),
        columns=columns,
        rows=table,
        domains=domains,
        matrix=[(label, [_shaded(value, most) for value in values]) for label, values in matrix],
        steps=[_step(s, records.get(s["name"]), path) for s in steps],
        curves=[figure for name, record in records.items() if (figure := loss_figure(name, record))],
    )


def recipe_state(of_steps: list[str]) -> str:
    """Where a recipe stands, by the states of its steps: what has gone wrong with one has gone wrong with all."""
    for state in ("failed", "stopped", "running"):
        if state in of_steps:
            return state
    return "done" if all(state in ("done", "skipped") for state in of_steps) else "unfinished"


def _cell(change: Change, is_best: bool) -> dict[str, Any]:
    return {"after": change.after, "text": change.text, "verdict": change.verdict, "best": is_best}


def _shaded(value: float | None, most: float) -> dict[str, float] | None:
    if value is None:
        return None
    return {"value": value, "heat": round(HEAT * max(value, 0) / most), "good": round(HEAT * max(-value, 0) / most)}


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
