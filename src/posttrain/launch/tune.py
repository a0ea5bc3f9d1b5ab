"""`posttrain tune`: successive halving (Jamieson & Talwalkar 2016, arXiv 1502.07943) over settings, by runs that go on.

All trials are begun with the schedule of the full length and stopped after a part of it; a third goes on from its checkpoints,
and so forth. What is left at the end is the very run that would have been without any stop. Who is best early is often only
the fastest, so half of the places are for those that the last half of their steps says will be best at the next judgement.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from rich.table import Table

from posttrain.config import compose as composing
from posttrain.config.judged import require_measured
from posttrain.config.stages import typed_config
from posttrain.console import console, say
from posttrain.errors import RunError, Stopped, UserError, did_you_mean
from posttrain.launch.halving import Scores, cost_of, forecast, half_of, places_of, rungs_of, survivors
from posttrain.launch.job_rows import live_page
from posttrain.launch.named_files import require_files
from posttrain.launch.proposals import Grid, Proposer, proposer
from posttrain.launch.sweep import launch_jobs, prepared_job
from posttrain.runs.files import write_json
from posttrain.runs.identity import content_hash, digest
from posttrain.training.checkpoint import newest_checkpoint

STATE = "tune.json"  # in its directory: what is tuned, and what became of each trial


def tune(
    stage: str, words: list[str], over: Sequence[str], trials: int, factor: int, metric: str, highest: bool,
    config_dir: Path | None = None, sampler: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Find the best of `trials` settings; returns {best, overrides, dir, command, rungs, steps, trials}.

    over: `KEY=LOW..HIGH`, in the logarithm, or `KEY=a,b`. sampler: what chooses among them (launch/proposals.py). factor: one in
    so many goes on to so many times the steps. The same command goes on where it was stopped. Raises UserError before a trial
    starts, RunError where all have failed, Stopped.
    """
    asked = proposer(sampler, over, trials)
    steps, rungs = _lengths(stage, words, asked.count, factor, config_dir)
    place, jobs, first = Path(), list[dict[str, Any]](), Scores()

    def judged(which: list[int], rung: int) -> Scores:
        if waiting := [i for i in which if _score(jobs[i], rung, metric, highest) is None]:
            with live_page(place, jobs, "search"):
                _advance(stage, words, config_dir, place, [jobs[i] for i in waiting], rung, steps)
        found = {i: _score(jobs[i], rung, metric, highest) for i in which}
        return {i: math.inf if score is None else score for i, score in found.items()}

    while wave := asked.wave(list(first.values())):
        configs = [_config(stage, [*words, *chosen], max(1, rungs[0] // 2), config_dir) for chosen in wave]
        if not jobs:
            require_measured(typed_config(configs[0]), metric, "--metric")
        for config in configs:
            require_files(config)
        if not jobs:
            place = _directory(stage, configs, words, over, metric, asked, rungs)
            whole = f"{cost_of(rungs, asked.count, factor)} of {asked.count * steps} steps"
            judgements = f"judged by {metric} after {', '.join(map(str, rungs))} steps"
            say(f"{asked.count} trials, {asked.line}, {judgements}; {whole} -> {place}")
        new = zip(wave, configs, strict=True)
        other = [*words, *("" for _ in over)]  # so that each is called by all that is tuned
        jobs += [
            prepared_job(place, len(first) + i, [*words, *chosen], [other], config) for i, (chosen, config) in enumerate(new)
        ]
        first |= judged(list(range(len(first), len(jobs))), rungs[0])
    alive, table = list(range(len(jobs))), dict[int, Scores]()
    for rung, places in zip(rungs, places_of(len(jobs), len(rungs), factor), strict=True):
        table[rung] = first if rung == rungs[0] else judged(alive, rung)
        if all(score == math.inf for score in table[rung].values()):
            raise RunError(_unmeasured(jobs[alive[0]], rung, metric))
        coming = Scores()
        if half := half_of(rung, rungs[0]):
            coming = forecast(table[rung], {i: _score(jobs[i], half, metric, highest) for i in alive}, factor, rung / half)
        staying = survivors(table[rung], coming, places)
        for i in set(alive) - set(staying):
            shutil.rmtree(Path(jobs[i]["dir"]) / "checkpoints", ignore_errors=True)  # it will not go on
        alive = staying
    return _outcome(stage, words, place, jobs, table, alive[0], metric, highest)


def _lengths(stage: str, words: list[str], trials: int, factor: int, config_dir: Path | None) -> tuple[int, list[int]]:
    """Steps of a whole run, and those after which trials are judged."""
    if factor < 2:
        raise UserError("--factor: one in so many goes on, so give 2 or more")
    if odd := next((word for word in words if word.lstrip("+").startswith(("train.eval_steps", "run.stop_after"))), None):
        raise UserError(f"{odd}: tune says itself when a trial stops and is measured; leave it out")
    steps = composing.compose_run(stage, words, config_dir)["train"]["max_steps"]
    if steps is None:
        raise UserError("train.max_steps: tune has to know how long a run is; give train.max_steps=...")
    return steps, rungs_of(steps, trials, factor)


def _config(stage: str, words: list[str], every: int, config_dir: Path | None) -> dict[str, Any]:
    return composing.compose_run(stage, [*words, f"train.eval_steps={every}"], config_dir)


def _directory(
    stage: str, configs: list[dict[str, Any]], words: list[str], over: Sequence[str], metric: str, asked: Proposer,
    rungs: list[int],
) -> Path:  # fmt: skip
    """run.dir, or one whose name follows from what is tuned. configs: of the first trials. Raises UserError for
    another tune's."""
    how = [] if isinstance(asked, Grid) else [list(over), asked.line]
    what = content_hash([digest(config) for config in configs], metric, rungs, *how)
    given = configs[0]["run"]["dir"]
    place = (Path(given).expanduser() if given else Path("runs") / "tune" / f"{stage}-{what[:8]}").resolve()
    state = {"stage": stage, "words": words, "over": list(over), "metric": metric, "of": what}
    if (place / STATE).exists() and json.loads((place / STATE).read_text(encoding="utf-8"))["of"] != what:
        raise UserError(f"run.dir: {place} is of another tune; give it another")
    try:
        place.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir: cannot write to {place}: {error.strerror}; give another run.dir") from None
    if not (place / STATE).exists():
        write_json(place / STATE, state)
    return place


def _advance(
    stage: str, words: list[str], config_dir: Path | None, place: Path, jobs: list[dict[str, Any]], rung: int, steps: int
) -> None:
    """Have these trials go on to a step, through the launcher of sweeps."""
    say(f"{len(jobs)} trials to step {rung} of {steps}")
    for job in jobs:
        file = Path(job["dir"]).with_suffix(".yaml")
        config = yaml.safe_load(file.read_text(encoding="utf-8"))
        begun, _ = newest_checkpoint(Path(job["dir"]) / "checkpoints")
        config["run"]["stop_after"] = None if rung == steps else rung - (begun.step if begun else 0)
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    # Hydra's launcher is to call so many jobs: each finds what it is by its number
    numbers = "run.stop_after=" + ",".join(str(i + 1) for i in range(len(jobs)))
    if launch_jobs(stage, [*words, numbers], config_dir, place, [{**job, "rung": rung} for job in jobs]):
        raise Stopped(f"tune was stopped by a signal; the same command goes on, in {place}")


def _score(job: dict[str, Any], rung: int, metric: str, highest: bool) -> float | None:
    """What a trial has reached at a step, lower better, infinite where that is no number; None where it has not been there."""
    found = [row[metric] for row in _measured(job, rung) if metric in row]
    if not found:
        return None
    if found[-1] is None or not math.isfinite(found[-1]):
        return math.inf
    return -found[-1] if highest else found[-1]


def _measured(job: dict[str, Any], rung: int) -> list[dict[str, Any]]:
    """The lines of its metrics of a step."""
    file = Path(job["dir"]) / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    return [row for row in map(_row, lines) if row.get("step") == rung]


def _unmeasured(job: dict[str, Any], rung: int, metric: str) -> str:
    """Why none has a metric: what there is in its place, or that there is nothing."""
    names = sorted({name for row in _measured(job, rung) for name in row if name.startswith(("eval/", "answers/"))})
    others = f", which have {', '.join(names)}{did_you_mean(metric, names)}" if names and metric not in names else ""
    return f"no trial has {metric} at step {rung}{others}; see {Path(job['dir']) / 'job.log'}"


def _row(line: str) -> dict[str, Any]:
    try:
        return json.loads(line)
    except ValueError:  # it was being written
        return {}


def _outcome(
    stage: str, words: list[str], place: Path, jobs: list[dict[str, Any]], table: dict[int, Scores], best: int, metric: str,
    highest: bool,
) -> dict[str, Any]:  # fmt: skip
    """Say it, write it down, and make the page."""
    from posttrain.reports.sweep_page import sweep_page

    sign = -1 if highest else 1
    rows = [_told(job, i, table, sign, metric, best) for i, job in enumerate(jobs)]
    said = [f"{key}={value}" for key, value in jobs[best]["overrides"].items()]
    kept = [word for word in words if word.lstrip("+").partition("=")[0] not in {"run.dir", *jobs[best]["overrides"]}]
    command = " ".join(["posttrain", stage, *kept, *said])
    spent = sum(max(rung for rung, scores in table.items() if i in scores) for i in range(len(jobs)))
    found = {"best": best, "overrides": jobs[best]["overrides"], "dir": jobs[best]["dir"], "command": command}
    found |= {"rungs": list(table), "steps": spent, "trials": rows}
    state = json.loads((place / STATE).read_text(encoding="utf-8"))
    write_json(place / STATE, state | found)
    shown = Table(*jobs[0]["overrides"], *(f"step {rung}" for rung in table), "")
    for i in sorted(range(len(jobs)), key=lambda i: [-len(rows[i]["scores"]), sign * (rows[i]["scores"][-1] or math.inf)]):
        figures = [*(f"{s:.4f}" if s is not None else "failed" for s in rows[i]["scores"]), *([""] * len(table))][: len(table)]
        shown.add_row(*rows[i]["overrides"].values(), *figures, "best" if i == best else "")
    console.print(shown)
    whole = len(jobs) * max(table)
    say(f"{spent} steps, {spent / whole:.0%} of the {whole} that all trials would take")
    say(f"best   {command}")
    say(f"run    {jobs[best]['dir']}")
    say(f"report {sweep_page(rows, place / 'report.html')}")
    return found


def _told(job: dict[str, Any], i: int, table: dict[int, Scores], sign: int, metric: str, best: int) -> dict[str, Any]:
    """A trial as the page has it. Only the best has figures of a whole run; others' are of fewer steps."""
    scores = [None if scores[i] == math.inf else sign * scores[i] for scores in table.values() if i in scores]
    last = max(rung for rung, found in table.items() if i in found)
    status = "failed" if scores[-1] is None else "done" if last == max(table) else f"out at step {last}"
    metrics = {metric: scores[-1]} if i == best else {}
    return {"overrides": job["overrides"], "dir": job["dir"], "status": status, "metrics": metrics, "scores": scores}
