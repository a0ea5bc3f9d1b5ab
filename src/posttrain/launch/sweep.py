"""Sweeps: every combination is a run in a process of its own, from a config that was checked before the first one started."""

from __future__ import annotations

import json
import os
import platform
import shutil
import signal
import subprocess
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import yaml
from filelock import FileLock, Timeout
from rich.table import Table

from posttrain.console import console, say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch import warm_worker
from posttrain.launch.gpus import one_gpu
from posttrain.launch.job_rows import last_line, live_page, row_of
from posttrain.launch.named_files import require_files
from posttrain.launch.subprocess_runner import in_group, worker_command
from posttrain.runs.files import write_json
from posttrain.runs.identity import digest
from posttrain.runs.manifest import is_finished, read_manifest
from posttrain.training.signals import PARENT, StopSignal, forward_to, leave_with_parent, passing_on, say_at_once

AT_WORK, STOPPED = ".at_work", "stopped"  # in the sweep's directory: who works on a job, and that no further one begins
PATIENCE = 120.0  # seconds for a worker of an earlier start
JOBS = "jobs.json"  # in the sweep's directory: what each job is, by its number
_stopped = False  # a signal came: the jobs that Hydra still launches return at once


def run_sweep(stage: str, overrides: list[str], config_dir: Path | None) -> list[dict[str, Any]]:
    """Run all jobs, write sweep.json and report.html, and return their rows.

    Raises UserError before any job starts, RunError after the last when some failed, Stopped after a signal.
    """
    from posttrain.config import compose as composing

    sets = composing.expand(stage, [o for o in overrides if not o.lstrip("+").startswith("hydra")], config_dir)
    configs = [composing.compose_run(stage, each, config_dir) for each in sets]
    for config in configs:
        require_files(config)
    sweep_dir = _directory(configs[0], stage)
    jobs = [
        prepared_job(sweep_dir, number, each, sets, config)
        for number, (each, config) in enumerate(zip(sets, configs, strict=True))
    ]
    say(f"sweep of {len(jobs)} jobs -> {sweep_dir}")
    with live_page(sweep_dir, jobs, "sweep"):
        stopped = launch_jobs(stage, overrides, config_dir, sweep_dir, jobs)
        rows = [row_of(each, stopped) for each in jobs]
        write_json(sweep_dir / "sweep.json", rows)
        if stopped:
            raise Stopped("the sweep was stopped by a signal; the same command with this run.dir goes on: " + str(sweep_dir))
    _show(rows, sweep_dir)
    if waiting := [row for row in rows if row["status"] == "stopped"]:
        raise Stopped(f"{len(waiting)} of {len(rows)} jobs were stopped; the same command goes on with run.dir={sweep_dir}")
    if failed := [row for row in rows if row["status"] == "failed"]:
        raise RunError(f"{len(failed)} of {len(rows)} jobs failed; see {Path(failed[0]['dir']) / 'job.log'}")
    return rows


def launch_jobs(stage: str, overrides: list[str], config_dir: Path | None, sweep_dir: Path, jobs: list[dict[str, Any]]) -> bool:
    """Run jobs of `prepared_job` through the launcher that the overrides name, which have to make as many; True where a signal
    has stopped them. A job with a `rung` ends there for now, and is not queued again."""
    from posttrain.config import compose as composing

    write_json(sweep_dir / JOBS, jobs)
    try:
        with _as_parent(), _passing_on(sweep_dir / AT_WORK) as stop:
            composing.launch(stage, overrides, config_dir, job, sweep_dir)
            return stop.requested or _stopped
    except Stopped:  # no job of this machine is at work
        return True
    finally:
        warm_worker.close()


def job(config: Any) -> None:
    """One job, called by a Hydra launcher, perhaps in another process: runs the worker on the config that was written for it."""
    global _stopped
    leave_with_parent(is_sure=False)  # where a launcher on this machine has put it into a process of its own
    from hydra.core.hydra_config import HydraConfig

    sweep_dir = Path(config.run.dir)
    jobs = json.loads((sweep_dir / JOBS).read_text(encoding="utf-8"))
    number = HydraConfig.get().job.num
    mine = jobs[number]
    directory, label = Path(mine["dir"]), f"[{number + 1}/{len(jobs)}] {mine['label']}"
    if _stopped or (sweep_dir / AT_WORK / STOPPED).exists():
        return
    if is_finished(directory) and mine["digest"] == read_manifest(directory).config_digest:
        say(f"{label}: done already")
        return
    began = time.monotonic()
    say(f"{label}: started")
    with _at_work(sweep_dir / AT_WORK), one_gpu() as environment:
        environment |= _share_of_cores(HydraConfig.get().launcher, len(jobs))
        code, _stopped = _work(directory, label, environment, warm=config.run.warm and len(jobs) > 1)
    if code == Stopped.exit_code and not _stopped and "rung" not in mine:
        _requeue()
    said = "" if code in (0, Stopped.exit_code) else f"failed (exit {code}): "
    outcome = _loss(row_of(mine)) if code == 0 else said + last_line(directory / "job.log")
    say(f"{label}: {outcome}, {time.monotonic() - began:.0f} s")


def _work(directory: Path, label: str, environment: dict[str, str], warm: bool) -> tuple[int, bool]:
    """Exit code of the worker, and whether a signal came; its words go to job.log, its progress is shown too."""
    directory.mkdir(parents=True, exist_ok=True)
    _wait_for(directory, label)
    config = directory.with_suffix(".yaml")
    with (directory / "job.log").open("a", encoding="utf-8") as log:
        try:
            if warm and (worker := warm_worker.for_jobs_in(environment)):
                return _follow(worker.start(config, environment), log, label)
        except warm_worker.Gone as gone:
            say(f"{label}: {gone}; this job and those after it start in a process each")
            _wait_for(directory, label)
        mine = environment | {PARENT: str(os.getpid())}
        command = worker_command(str(config))
        return _follow(subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=mine), log, label)


def _follow(child: Any, log: IO[str], label: str) -> tuple[int, bool]:
    with forward_to(child) as stop:
        for raw in child.stdout:
            line = raw.decode(errors="replace")
            log.write(line)
            log.flush()
            if "  eta " in line:
                say(f"{label}: {line.strip()}")
        try:
            return child.wait(), stop.requested
        except warm_worker.Gone:
            if stop.requested:
                return Stopped.exit_code, True
            raise


def _wait_for(directory: Path, label: str) -> None:
    """A worker that an earlier start has left behind is saving; it is gone in a moment."""
    lock = FileLock(directory / ".lock")
    try:
        lock.acquire(blocking=False)
    except Timeout:
        say(f"{label}: waits for the process that is still at work in {directory}")
        with suppress(Timeout):  # then the worker says so
            lock.acquire(timeout=PATIENCE)
    lock.release()


def _share_of_cores(launcher: Any, jobs: int) -> dict[str, str]:
    """Jobs beside each other on one machine have a share of its threads each, unless the user has said how many."""
    beside = int(launcher.get("n_jobs") or 1)
    cores = os.cpu_count() or 1
    beside = min(jobs, beside if beside > 0 else cores)
    return {} if beside < 2 or "OMP_NUM_THREADS" in os.environ else {"OMP_NUM_THREADS": str(max(1, cores // beside))}


def _requeue() -> None:
    """Slurm gives a job that was stopped before its end another turn, in which it goes on."""
    if (number := os.environ.get("SLURM_JOB_ID")) and shutil.which("scontrol"):
        subprocess.run(["scontrol", "requeue", number], check=False)


@contextmanager
def _as_parent() -> Generator[None]:
    """Processes that a launcher starts inside know that they are not to outlive this one."""
    os.environ[PARENT] = str(os.getpid())
    try:
        yield
    finally:
        os.environ.pop(PARENT, None)


@contextmanager
def _at_work(folder: Path) -> Generator[None]:
    """Inside, the sweep's own process knows of this one, and has it stopped."""
    mine = folder / f"{platform.node()}~{os.getpid()}"
    folder.mkdir(exist_ok=True)
    mine.touch()
    try:
        yield
    finally:
        mine.unlink(missing_ok=True)


@contextmanager
def _passing_on(folder: Path) -> Generator[StopSignal]:
    """Inside, a signal goes on to all jobs that are at work on this machine, which save and leave; no further one begins.

    Where none is (they wait, or are other machines' own), it raises Stopped.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    def stop_all(_: int) -> None:
        if not (folder / STOPPED).exists():
            say_at_once("stopping: the jobs at work finish their step, save and leave; no further one begins")
        (folder / STOPPED).touch()
        others = [int(each.name.rpartition("~")[2]) for each in folder.glob(f"{platform.node()}~*")]
        others = [process for process in others if process != os.getpid()]
        for process in others:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGTERM)
        if not others:
            raise Stopped("between jobs")

    try:
        with passing_on(stop_all) as stop:
            yield stop
    finally:
        shutil.rmtree(folder, ignore_errors=True)


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


def prepared_job(sweep_dir: Path, number: int, mine: list[str], sets: list[list[str]], config: dict[str, Any]) -> dict[str, Any]:
    """A job as jobs.json has it, with its config written beside its directory. mine: its overrides, of all jobs' `sets`."""
    swept = [line for i, line in enumerate(mine) if any(other[i] != line for other in sets)]
    label = " ".join(line.split("=")[0].rsplit(".", 1)[-1] + "=" + line.split("=", 1)[1] for line in swept)
    directory = sweep_dir / "-".join([f"{number:03d}", *_safe(label).split()])
    config = in_group(config, sweep_dir.name) | {"run": {**config["run"], "dir": str(directory)}}
    directory.with_suffix(".yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    overrides = dict(line.lstrip("+").split("=", 1) for line in swept)
    return {"overrides": overrides, "label": label, "dir": str(directory), "digest": digest(config)}


def _safe(label: str) -> str:
    return "".join(c if c.isalnum() or c in "=._- " else "_" for c in label)[:80]


def _loss(row: dict[str, Any]) -> str:
    return f"eval/loss {row['metrics']['eval/loss']:.4f}" if "eval/loss" in row["metrics"] else "done"


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
