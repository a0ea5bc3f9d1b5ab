"""What run directories say, as reports and tables need it: metrics before and after, curves, lineage."""

from __future__ import annotations

import json
import math
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from jinja2 import TemplateError

from posttrain.config.metrics import direction, metric, place, show, title
from posttrain.errors import UserError
from posttrain.evaluation.forgetting import forgetting_percent
from posttrain.evaluation.paired import COUNT, HIGH, LOW
from posttrain.runs.directory import CONFIG, read_config
from posttrain.runs.earlier import current_figures
from posttrain.runs.manifest import Manifest, is_finished, is_number, read_manifest

HELD_OUT = "held_out.json"  # a value for each held-out row

SMALLEST = 0.005  # a loss that changes by less than this share of it is not called better or worse


@dataclass(frozen=True)
class Record:
    """A run's directory as read. manifest: None while the run has not finished. history: the lines of metrics.jsonl."""

    dir: Path
    config: dict[str, Any]
    manifest: Manifest | None
    history: list[dict[str, Any]]

    @property
    def held_out_rows(self) -> int | None:
        """How many rows are held out; None where that is not known."""
        held_out = self.manifest.held_out if self.manifest else None
        return held_out.to_dict().get("rows") if held_out else None

    def rows_of(self, name: str) -> dict[str, list[float]]:
        """Each held-out row's summed loss and count, of one loss; empty where none were kept."""
        path, key = self.dir / HELD_OUT, name.removeprefix("eval/")
        found: Any = json.loads(path.read_text(encoding="utf-8")) if name.endswith("/loss") and path.exists() else {}
        kept = {"sums": found.get(key), "counts": found.get(key + COUNT)}
        return kept if all(kept.values()) else {}

    @property
    def metrics(self) -> dict[str, float]:
        """The manifest's metrics; of an unfinished run what was measured so far, under the same names."""
        if self.manifest:
            return self.manifest.metrics
        found: dict[str, float] = {}
        for line in self.history:
            held_out = {k: v for k, v in line.items() if "/" in k and not k.startswith("train/")}
            found |= held_out if line["step"] else {f"{k}_before": v for k, v in held_out.items()}
        return found

    def series(self, name: str) -> tuple[list[float], list[float]]:
        """Steps and finite values of one metric."""
        pairs = [(line["step"], line[name]) for line in self.history if name in line and math.isfinite(line[name])]
        return [step for step, _ in pairs], [value for _, value in pairs]


@dataclass(frozen=True)
class Change:
    """A metric before and after, in words. verdict: better, worse, or empty where neither can be said. between: the change's 95 %
    interval, where the rows were kept that it follows from."""

    name: str
    before: str
    after: str
    text: str
    verdict: str
    between: str = ""

    @property
    def title(self) -> str:
        """The metric's name in words."""
        return title(self.name)


@dataclass(frozen=True)
class ChainRow:
    """A state of the model in a recipe: its held-out figures, and those of the state it was made from."""

    label: str
    values: dict[str, float]
    before: dict[str, float] = field(default_factory=dict[str, float])

    def change(self, name: str) -> Change:
        """A figure beside that of the state before."""
        return compare(name, self.before.get(name), self.values.get(name), interval=interval_of(name, self.values))


def read_record(directory: Path) -> Record:
    """Raises UserError when `directory` is no run or cannot be read. A line cut short by a kill is left out."""
    metrics = directory / "metrics.jsonl"
    if not (directory / CONFIG).exists():
        raise UserError(f"{directory} is no run (no {CONFIG}); give a run's directory")
    config = read_config(directory)
    found = read_manifest(directory) if is_finished(directory) else None
    try:
        text = metrics.read_text(encoding="utf-8", errors="replace") if metrics.exists() else ""
    except OSError as e:
        raise UserError(f"{directory} cannot be read: {e}") from None
    return Record(directory, config, found, parsed_lines(text))


def parsed_lines(text: str) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole, with today's names."""
    return [line for line in map(_line, text.splitlines()) if line]


def _line(text: str) -> dict[str, Any]:
    try:
        found: Any = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    if not isinstance(found, dict):
        return {}
    figures = {name: value for name, value in cast("dict[str, Any]", found).items() if is_number(value)}
    return current_figures(figures) if "step" in figures else {}


@contextmanager
def as_written(what: Path) -> Generator[None]:
    """Turn the errors that a damaged record causes (a key or type that is wrong) into a UserError about `what`."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, IndexError, ArithmeticError, TemplateError) as e:
        reason = f"{type(e).__name__}: {' '.join(str(e).split())[:200]}"
        raise UserError(f"{what} is not as posttrain writes it ({reason}); is a file of it damaged?") from e


def compare(
    name: str, before: float | None, after: float | None, rows: int | None = None, interval: tuple[float, float] | None = None
) -> Change:
    """A metric before and after, in words, and whether that is better. rows: that it was measured on, of which a share's noise
    follows. interval: of the loss's change (`interval_of`)."""
    if before is None or after is None:
        return Change(name, show(name, before), show(name, after), "", "")
    if not (math.isfinite(before) and math.isfinite(after)):
        lost, found = math.isfinite(before), math.isfinite(after)
        text = "no number any more" if lost else "a number again" if found else ""
        return Change(name, show(name, before), show(name, after), text, "worse" if lost else "")
    difference = after - before
    text = _difference(name, before, difference)
    good = difference * direction(name)
    is_noise = interval[0] <= 0 <= interval[1] if interval else abs(difference) < noise(name, before, after, rows)
    tiny = not any(digit in text for digit in "123456789")
    verdict = "" if tiny or is_noise or good == 0 else "better" if good > 0 else "worse"
    ends = [_difference(name, before, end) for end in interval] if interval and name.endswith("/loss") else []
    return Change(name, show(name, before), show(name, after), text, verdict, " to ".join(ends))


def interval_of(name: str, metrics: dict[str, float]) -> tuple[float, float] | None:
    """95 % interval of the change of the loss that a figure follows from (`evaluation/paired.py`); None where none is kept."""
    group, _, kind = name.rpartition("/")
    loss = {"loss": name, "perplexity": f"{group}/loss"}.get(kind) or ("general/loss" if group == "forgetting" else "")
    low, high = metrics.get(loss + LOW), metrics.get(loss + HIGH)
    return None if low is None or high is None else (low, high)


def noise(name: str, before: float, after: float, rows: int | None = None) -> float:
    """A change that is smaller says nothing: of a share two standard errors of the difference (a point where the rows are not
    known), of a loss `SMALLEST` of it."""
    form = metric(name).form
    if form == "share":
        middle = (before + after) / 2
        return 2 * math.sqrt(2 * max(middle * (1 - middle), 0.0) / rows) if rows else 0.01
    if form == "percent":
        return 100 * SMALLEST
    return SMALLEST * abs(before) if direction(name) < 0 else 0.0


def _difference(name: str, before: float, difference: float) -> str:
    kind = name.rsplit("/", 1)[-1]
    if metric(name).form == "share":
        return f"{100 * difference:+.1f} points"
    if kind in ("loss", "perplexity") and before > 0:
        return f"{100 * difference / before:+.2f} %"
    return f"{difference:+.2f} points" if kind == "percent" else f"{difference:+.4f}"


def before_and_after(metrics: dict[str, float], rows: int | None = None) -> list[Change]:
    """Every metric of both sides (or, in a run under way, of one): own held-out rows first (`rows` many), then set by set."""
    names = {name.removesuffix("_before") for name in metrics if not name.endswith((LOW, HIGH))} - {"forgetting/percent"}
    ordered = sorted(names, key=lambda name: (not name.startswith("eval/"), name.rpartition("/")[0], place(name), name))
    twins = [(n, metrics.get(f"{n}_before"), metrics.get(n)) for n in ordered]
    return [compare(*t, rows if t[0].startswith("eval/") else None, interval_of(t[0], metrics)) for t in twins]


def chain_table(records: list[tuple[str, Record]]) -> tuple[list[str], list[ChainRow]]:
    """Columns (one figure a set, and forgetting) and rows (the start, then after every step) of a recipe.

    records: step names with their finished runs. Forgetting is counted from the start of the whole chain.
    """
    if not records:
        return [], []
    first = records[0][1]
    rows = [ChainRow("start" if first.manifest and first.manifest.parents else "base", _before(first.metrics))]
    rows += [ChainRow(f"after {name}", dict(r.metrics), _before(r.metrics)) for name, r in records]
    origin = rows[0].values.get("general/loss")
    for row in rows[1:]:
        row.values.pop("forgetting/percent", None)
        if origin and "general/loss" in row.values:
            row.values["forgetting/percent"] = forgetting_percent(origin, row.values["general/loss"])
            row.before["forgetting/percent"] = forgetting_percent(origin, row.before["general/loss"])
    columns = summary_columns([row.values for row in rows])
    return [name for name in columns if not name.startswith("eval/")], rows


def summary_columns(metrics: list[dict[str, float]]) -> list[str]:
    """The stage's own loss and accuracy, one figure a set (the general one last), and forgetting."""
    names = list(dict.fromkeys(n for found in metrics for n in found if not n.endswith("_before")))
    sets = dict.fromkeys(n.split("/")[0] for n in names if not n.startswith(("eval/", "forgetting/")))
    columns = [n for n in ("eval/loss", "eval/accuracy", "eval/reward", "eval/kl") if n in names]
    figures = (_headline(each, names) for each in sets)
    columns += sorted((name for name in figures if name), key=lambda name: name.startswith("general/"))
    return columns + [n for n in names if n == "forgetting/percent"]


def _before(metrics: dict[str, float]) -> dict[str, float]:
    return {n.removesuffix("_before"): v for n, v in metrics.items() if n.endswith("_before")}


def _headline(group: str, names: list[str]) -> str | None:
    """One figure for a set, if it has one: accuracy of pairs, perplexity of text, loss (forgetting is counted in it), drift."""
    wanted = ("accuracy", "loss") if group == "general" else ("accuracy", "perplexity", "loss", "percent")
    return next((f"{group}/{kind}" for kind in wanted if f"{group}/{kind}" in names), None)


def own_result(record: Record) -> Change | None:
    """What the stage was trained for, on its own held-out rows."""
    m = record.metrics
    name = next((n for n in ("eval/accuracy", "eval/reward", "eval/loss") if n in m), None)
    return compare(name, m.get(f"{name}_before"), m[name], record.held_out_rows, interval_of(name, m)) if name else None


def plain(value: Any) -> str:
    """A config's value as one would type it on the command line."""
    if isinstance(value, float):
        return f"{value:.10g}"
    return "null" if value is None else str(value)


def duration(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
