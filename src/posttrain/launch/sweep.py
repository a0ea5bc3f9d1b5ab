"""Sweeps: every combination is a run in a process of its own, from a config that was checked before the first one started."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Generator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout
from rich.table import Table

from posttrain.console import console, say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.subprocess_runner import worker_command
from posttrain.runs.files import write_json
from posttrain.runs.identity import digest
from posttrain.runs.manifest import is_finished, read_manifest
from posttrain.training.signals import forward_to

JOBS = "jobs.json"  # in the sweep's directory: what each job is, by its number
_stopped = False  # a signal came: the jobs that Hydra still launches return at once


def run_sweep(stage: str, overrides: list[str], config_dir: Path | None) -> list[dict[str, Any]]:
    """Run all jobs, write sweep.json and report.html, and return their rows.

    Raises UserError before any job starts, RunError after the last when some failed, Stopped after a signal.
    """
    from posttrain.config import compose as composing

    sets = composing.expand(stage, [o for o in overrides if not o.lstrip("+").startswith("hydra")], config_dir)
    configs = [composing.compose_run(stage, each, config_dir) for each in sets]
    sweep_dir = _directory(configs[0], stage)
    jobs = [_job(sweep_dir, number, each, sets, config) for number, (each, config) in enumerate(zip(sets, configs, strict=True))]
    write_json(sweep_dir / JOBS, jobs)
    say(f"sweep of {len(jobs)} jobs -> {sweep_dir}")
    composing.launch(stage, overrides, config_dir, job, sweep_dir)
    rows = [_row(each) for each in jobs]
    write_json(sweep_dir / "sweep.json", rows)
    _show(rows, sweep_dir)
    if _stopped:
        raise Stopped("the sweep was stopped by a signal; the same command with this run.dir goes on: " + str(sweep_dir))
    if failed := [row for row in rows if row["status"] == "failed"]:
        raise RunError(f"{len(failed)} of {len(rows)} jobs failed; see {Path(failed[0]['dir']) / 'job.log'}")
    return rows


def job(config: Any) -> None:
    """One job, called by a Hydra launcher, perhaps in another process: runs the worker on the config that was written for it."""
    global _stopped
    from hydra.core.hydra_config import HydraConfig

    sweep_dir = Path(config.run.dir)
    jobs = json.loads((sweep_dir / JOBS).read_text(encoding="utf-8"))
    number = HydraConfig.get().job.num
    mine = jobs[number]
    directory, label = Path(mine["dir"]), f"[{number + 1}/{len(jobs)}] {mine['label']}"
    if _stopped:
        return
    if is_finished(directory) and mine["digest"] == read_manifest(directory).config_digest:
        say(f"{label}: done already")
        return
    began = time.monotonic()
    say(f"{label}: started")
    with one_gpu() as environment:
        code, _stopped = _work(directory, label, environment)
    outcome = _loss(_row(mine)) if code == 0 else f"failed (exit {code}): {_last_line(directory / 'job.log')}"
    say(f"{label}: {outcome}, {time.monotonic() - began:.0f} s")


def _work(directory: Path, label: str, environment: dict[str, str]) -> tuple[int, bool]:
    """Exit code of the worker, and whether a signal came; its words go to job.log, its progress is shown too."""
    directory.mkdir(parents=True, exist_ok=True)
    command = worker_command(str(directory.with_suffix(".yaml")))
    with (directory / "job.log").open("a", encoding="utf-8") as log:
        child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=environment)
        with _forwarding(child) as requested:
            assert child.stdout
            for raw in child.stdout:
                line = raw.decode(errors="replace")
                log.write(line)
                log.flush()
                if "  eta " in line:
                    say(f"{label}: {line.strip()}")
            return child.wait(), requested()


@contextmanager
def _forwarding(child: subprocess.Popen[bytes]) -> Generator[Any]:
    import threading

    if threading.current_thread() is not threading.main_thread():  # a launcher's thread cannot install handlers
        yield lambda: False
        return
    with forward_to(child) as stop:
        yield lambda: stop.requested


@contextmanager
def one_gpu() -> Generator[dict[str, str]]:
    """The environment for one job: with a GPU that no other job of this machine holds, where there is any GPU."""
    gpus = _gpus()
    with ExitStack() as held:
        while gpus:
            for gpu in gpus:
                lock = FileLock(Path(os.environ.get("TMPDIR", "/tmp")) / f"posttrain-gpu-{gpu}.lock", blocking=False)
                try:
                    held.enter_context(lock)
                except Timeout:
                    continue
                yield {**os.environ, "CUDA_VISIBLE_DEVICES": gpu}
                return
            time.sleep(1.0)
        yield dict(os.environ)


def _gpus() -> list[str]:
    if "CUDA_VISIBLE_DEVICES" in os.environ:
        return [gpu for gpu in os.environ["CUDA_VISIBLE_DEVICES"].split(",") if gpu]
    if not shutil.which("nvidia-smi"):
        return []
    listed = subprocess.run(["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"], capture_output=True, text=True)
    return listed.stdout.split()


def _directory(config: dict[str, Any], stage: str) -> Path:
    given = config["run"]["dir"]
    name = f"{time.strftime('%Y%m%d-%H%M%S')}-{stage}-{digest(config)[:8]}"
    directory = Path(given).expanduser() if given else Path("runs") / "sweeps" / name
    if is_finished(directory):
        raise UserError(f"run.dir: {directory} is a single run's directory; give the sweep another")
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as e:
        raise UserError(f"run.dir: cannot write to {directory}: {e.strerror}; give another run.dir") from None
    return directory.resolve()


def _job(sweep_dir: Path, number: int, mine: list[str], sets: list[list[str]], config: dict[str, Any]) -> dict[str, Any]:
    swept = [line for i, line in enumerate(mine) if any(other[i] != line for other in sets)]
    label = " ".join(line.split("=")[0].rsplit(".", 1)[-1] + "=" + line.split("=", 1)[1] for line in swept)
    directory = sweep_dir / "-".join([f"{number:03d}", *_safe(label).split()])
    config = {**config, "run": {**config["run"], "dir": str(directory)}}
    directory.with_suffix(".yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    overrides = dict(line.lstrip("+").split("=", 1) for line in swept)
    return {"overrides": overrides, "label": label, "dir": str(directory), "digest": digest(config)}


def _safe(label: str) -> str:
    return "".join(c if c.isalnum() or c in "=._- " else "_" for c in label)[:80]


def _row(job: dict[str, Any]) -> dict[str, Any]:
    directory = Path(job["dir"])
    row = {"overrides": job["overrides"], "dir": job["dir"]}
    if is_finished(directory):
        manifest = read_manifest(directory)
        return row | {"status": "done", "metrics": manifest.metrics, "seconds": manifest.seconds}
    return row | {"status": "failed", "metrics": {}, "error": _last_line(directory / "job.log")}


def _loss(row: dict[str, Any]) -> str:
    return f"eval/loss {row['metrics']['eval/loss']:.4f}" if "eval/loss" in row["metrics"] else "done"


def _last_line(log: Path) -> str:
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it never started"


def _show(rows: list[dict[str, Any]], sweep_dir: Path) -> None:
    from posttrain.reports.sweep_page import alpha_star, sweep_page

    keys = list(rows[0]["overrides"])
    names = [n for n in ("eval/loss", "eval/accuracy", "forgetting/percent") if any(n in row["metrics"] for row in rows)]
    table = Table(*keys, *names, "seconds", "status")
    for row in sorted(rows, key=lambda row: row["metrics"].get("eval/loss", float("inf"))):
        figures = [f"{row['metrics'][n]:.4f}" if n in row["metrics"] else "" for n in names]
        table.add_row(*(row["overrides"][k] for k in keys), *figures, f"{row.get('seconds', 0):.0f}", row["status"])
    console.print(table)
    if chosen := alpha_star(rows, sweep_dir / "report.html"):
        say(chosen)
    say(f"rows   {sweep_dir / 'sweep.json'}")
    say(f"report {sweep_page(rows, sweep_dir / 'report.html')}")
