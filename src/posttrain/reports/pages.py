"""What the pages share: templates, links, and tables and pictures of several runs."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import os
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from posttrain.config.metrics import direction, show, title
from posttrain.evaluation.paired import change_interval
from posttrain.reports.plots import COLORS, Curve, Figure, line_figure
from posttrain.reports.run_records import Record, noise
from posttrain.runs.files import PAGE, write_text

HEAT = 36  # percent of a colour, at most, behind a figure that is to be read
REFRESH = 10  # seconds after which the page of what goes on is looked at again
LETTERS = 1500  # of an answer that a page shows
_FOLDER = Path(__file__).parent / "templates"
_TEMPLATES = Environment(
    loader=FileSystemLoader(_FOLDER),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


@dataclass(frozen=True)
class Cell:
    """A figure in a table; best: is it the best of its column?"""

    text: str
    best: bool = False


def write_page(path: Path, template: str, **values: Any) -> Path:
    """Write a page without a script, and return its path."""
    write_text(path, render(template, script=None, **values))
    return path


def render(template: str, script: str | None = "plots.js", **values: Any) -> str:
    """A page from a template. script: the one of ours that is in it; by its hash the browser knows it, and runs no other."""
    code = (_FOLDER / script).read_text(encoding="utf-8") if script else ""
    known = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    values = {
        "titled": title,
        "live": None,
        "written": time.strftime("%Y-%m-%d %H:%M:%S"),
        "connects": False,
        "why": "",
        **values,
    }
    page = _TEMPLATES.get_template(template).render(script=Markup(code), script_hash=f"sha256-{known}", **values)
    return page.encode(errors="replace").decode()  # half a letter, of a file or a name that is no UTF-8, is a question mark


def live_note(every: float = 0) -> dict[str, int]:
    """Of a page that is written again: when it was written, after how many seconds it will be, when to look."""
    return {"written": int(time.time()), "every": round(every), "refresh": REFRESH}


def read_samples(run_dir: Path) -> list[dict[str, Any]]:
    """Answers to held-out prompts that a run has kept, the long ones cut."""
    path = run_dir / "samples.json"
    found: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    for sample in found:
        for answer in sample["answers"]:
            answer["text"] = _cut(answer["text"])
    return found


def _cut(text: str) -> str:
    """With no more than one empty line at a time: a model that has learnt little may write nothing else."""
    text = re.sub(r"\n\s*\n\s*\n", "\n\n", text.strip())
    return text if len(text) <= LETTERS else f"{text[:LETTERS]} … ({len(text):,} letters)"


def run_name(directory: Path) -> str:
    """The name of a run on pages."""
    return directory.resolve().name


def page_link(run_dir: Path, page: Path) -> str:
    """Relative address of a run's page as seen from `page`; empty when there is none."""
    target = run_dir / PAGE
    return "./" + quote(os.fsencode(os.path.relpath(target.resolve(), page.parent.resolve()))) if target.exists() else ""


def metric_grid(
    metrics: list[dict[str, float]], names: list[str], rated: list[str], records: Sequence[Record | None] = ()
) -> list[list[Cell]]:
    """One row of cells a run. The best of each `rated` column is marked, where it is better than the next. records: the runs,
    where they are at hand: a loss is then held against each row's of the others."""
    kept = {n: [r.rows_of(n) if r else {} for r in records] for n in rated}
    best = {n: best_of(n, [m.get(n) for m in metrics], kept[n]) if n in rated else None for n in names}
    return [[Cell(show(n, m.get(n)), best[n] == i) for n in names] for i, m in enumerate(metrics)]


def overlays(records: list[tuple[str, Record]]) -> list[Figure]:
    """Loss curves of runs of one stage; beyond eight, the first stands out and the rest are grey."""
    stage = "".join({record.config["stage"] for _, record in records})
    train = _overlay(f"Training loss, {stage}", [(label, *r.series("train/loss")) for label, r in records], True)
    held_out = [(label, *r.series("eval/loss")) for label, r in records]
    seen_more = any(len(x) > 2 for _, x, _ in held_out)  # else before and after only: the table says it
    return [f for f in (train, _overlay(f"Held-out loss, {stage}", held_out, False) if seen_more else None) if f]


def _overlay(title: str, series: list[tuple[str, list[float], list[float]]], smooth: bool) -> Figure | None:
    few = len(series) <= COLORS
    curves = [
        Curve(label, x, y, color=i + 1 if few or not i else 0, smooth=smooth, strong=not i)
        for i, (label, x, y) in enumerate(series)
    ]
    return line_figure(title, curves)


def best_of(name: str, values: Sequence[float | None], rows: Sequence[dict[str, list[float]]] = ()) -> int | None:
    """Index of the best value; None where it cannot be said, or the next best is within what noise does. rows: each value's
    (`Record.rows_of`): where both have the same, their difference's 95 % interval decides."""
    known = [(value * -direction(name), i) for i, value in enumerate(values) if value is not None and math.isfinite(value)]
    if len(known) < 2 or not direction(name):
        return None
    best, second = sorted(known)[:2]
    first, other = (rows[best[1]], rows[second[1]]) if rows else ({}, {})
    paired = first and other and first["counts"] == other["counts"]
    if paired and (ends := change_interval(first["sums"], other["sums"], first["counts"])):
        return best[1] if ends[0] > 0 else None
    differs = second[0] - best[0] > 0 and second[0] - best[0] >= noise(name, abs(best[0]), abs(second[0]))
    return best[1] if differs else None
