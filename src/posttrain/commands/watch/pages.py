"""What `posttrain watch` answers: the table of a folder, pages of its runs, sweeps and recipes, and comparisons."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any
from urllib.parse import quote, urlencode

from posttrain.commands.watch.folder import Folder, SeenGroup, SeenRun
from posttrain.config.metrics import rounded, show
from posttrain.errors import UserError
from posttrain.reports.compare_page import compare_html
from posttrain.reports.pages import render
from posttrain.reports.recipe_page import recipe_html
from posttrain.reports.run_page import run_html
from posttrain.reports.sweep_page import sweep_html
from posttrain.runs.files import PAGE

TOGETHER = 30  # runs that are compared at once, at most
Key = Callable[[SeenRun], Any]


@dataclass(frozen=True)
class Column:
    """title: on the page; down: is the most, or the newest, wanted first?"""

    title: str
    value: Key
    down: bool = False
    is_number: bool = False


COLUMNS: dict[str, Column] = {
    "run": Column("run", lambda run: run.name),
    "state": Column("state", lambda run: run.state),
    "step": Column("step", lambda run: run.step, True, True),
    "loss": Column("loss", lambda run: run.figures.get("train/loss"), False, True),
    "held_out": Column("held-out loss", lambda run: run.figures.get("eval/loss"), False, True),
    "speed": Column("speed, /s", lambda run: run.speed, True, True),
    "changed": Column("last change", lambda run: run.changed, True, True),
    "stage": Column("stage", lambda run: run.stage),
    "method": Column("method", lambda run: run.method),
    "model": Column("model", lambda run: run.model),
}
FIRST = "changed"  # the column by which the table is in order at first


@dataclass(frozen=True)
class Asked:
    """path: of the address, without its first slash; words: behind its question mark."""

    path: str
    words: dict[str, list[str]]

    def word(self, name: str) -> str:
        """The last one of a name; empty where there is none."""
        return self.words.get(name, [""])[-1]


def answer(folder: Folder, asked: Asked) -> tuple[HTTPStatus, str]:
    """A status, and a page or a line of text."""
    runs = folder.runs()
    try:
        if asked.path == "":
            return HTTPStatus.OK, table_html(folder, runs, asked)
        if asked.path == "compare":
            return _compared(folder, runs, asked)
        if asked.path == PAGE:
            return _page(".", folder, runs)
        if asked.path.endswith(f"/{PAGE}"):
            return _page(asked.path.removesuffix(f"/{PAGE}"), folder, runs)
    except UserError as error:
        return HTTPStatus.INTERNAL_SERVER_ERROR, str(error)
    return HTTPStatus.NOT_FOUND, "there is no such page"


def _page(name: str, folder: Folder, runs: dict[str, SeenRun]) -> tuple[HTTPStatus, str]:
    if run := runs.get(name):
        return HTTPStatus.OK, run_html(run.dir)
    if group := folder.groups(runs).get(name):
        if group.kind == "sweep":
            return HTTPStatus.OK, sweep_html(group.rows, group.dir / PAGE)
        return HTTPStatus.OK, recipe_html(group.rows, group.dir / PAGE)
    return HTTPStatus.NOT_FOUND, "there is no such run"


def _compared(folder: Folder, runs: dict[str, SeenRun], asked: Asked) -> tuple[HTTPStatus, str]:
    names = list(dict.fromkeys(asked.words.get("run", [])))
    if not 1 <= len(names) <= TOGETHER:
        return HTTPStatus.BAD_REQUEST, f"choose runs in the table, {TOGETHER} at most"
    if gone := [name for name in names if name not in runs]:
        return HTTPStatus.NOT_FOUND, f"{len(gone)} of the chosen runs are not there"
    return HTTPStatus.OK, compare_html([runs[name].dir for name in names], folder.root / PAGE, live=True)


def table_html(folder: Folder, runs: dict[str, SeenRun], asked: Asked) -> str:
    """All runs of the folder, in the order that was asked for."""
    key = asked.word("sort") if asked.word("sort") in COLUMNS else FIRST
    down = asked.word("order") == "down" if asked.word("order") else COLUMNS[key].down
    groups = folder.groups(runs)
    counts = [f"{sum(run.state == state for run in runs.values())} {state}" for state in _states(runs)]
    name = folder.root.name or str(folder.root)
    return render(
        "watch.html",
        script="watch.js",
        connects=True,
        title=f"posttrain watch: {name}",
        kicker="runs of a folder",
        heading=name,
        state="",
        lead=f"{len(runs)} runs: {', '.join(counts)}" if runs else "",
        heads=[_head(each, key, down) for each in COLUMNS],
        rows=[_row(run) for run in in_order(runs, key, down)],
        groups=[_group(group) for group in groups.values()],
    )


def in_order(runs: dict[str, SeenRun], key: str, down: bool) -> list[SeenRun]:
    """By a column; those that have no number in it come behind, and those that have nothing last, either way."""
    value = COLUMNS[key].value
    found = [(run, value(run)) for run in runs.values()]
    known = [run for run, each in found if each is not None and each == each]  # NaN is no place in an order
    odd = [run for run, each in found if each is not None and each != each]
    return sorted(known, key=value, reverse=down) + odd + [run for run, each in found if each is None]


def _states(runs: dict[str, SeenRun]) -> list[str]:
    found = {run.state for run in runs.values()}
    return [state for state in ("running", "done", "stopped", "failed", "unfinished", "damaged") if state in found]


def _head(name: str, key: str, down: bool) -> dict[str, Any]:
    column = COLUMNS[name]
    next_down = not down if name == key else column.down
    order = ("descending" if down else "ascending") if name == key else ""
    link = "?" + urlencode({"sort": name, "order": "down" if next_down else "up"})
    return {"title": column.title, "order": order, "href": link, "is_number": column.is_number}


def _row(run: SeenRun) -> dict[str, Any]:
    loss, held_out = run.figures.get("train/loss"), run.figures.get("eval/loss")
    return {
        "name": run.name,
        "href": f"/{quote(os.fsencode(run.name))}/{PAGE}",
        "state": run.state,
        "why": run.why,
        "words": [run.stage, run.method, run.model],
        "numbers": [
            f"{run.step:,} of {run.steps:,}" if run.steps and run.state != "done" else f"{run.step:,}",
            show("loss", loss) if loss is not None else "",
            show("loss", held_out) if held_out is not None else "",
            rounded(run.speed) if run.speed is not None else "",
            ago(time.time() - run.changed) if run.changed else "",
        ],
    }


def _group(group: SeenGroup) -> dict[str, Any]:
    compared = "/compare?" + urlencode([("run", os.fsencode(name)) for name in group.members[:TOGETHER]])
    return {
        "name": group.name,
        "kind": group.kind,
        "state": group.state,
        "count": len(group.members),
        "href": f"/{quote(os.fsencode(group.name))}/{PAGE}",
        "compared": compared if group.members else "",
    }


def ago(seconds: float) -> str:
    """How long it is since something, in the largest unit that says enough."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{int(seconds // size)} {unit} ago"
    return f"{max(0, int(seconds))} s ago"
