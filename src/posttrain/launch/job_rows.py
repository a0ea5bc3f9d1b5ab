"""What has become of a sweep's jobs, as its page and its table have it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from posttrain.reports.live import KeptLive
from posttrain.runs.directory import CONFIG
from posttrain.runs.files import PAGE
from posttrain.runs.manifest import is_finished, read_manifest
from posttrain.runs.status import standing


def row_of(job: dict[str, Any], stopped: bool = False) -> dict[str, Any]:
    """Of a job that has ended. stopped: the sweep was, so that a job has failed only where it says so."""
    directory = Path(job["dir"])
    row = {"overrides": job["overrides"], "dir": job["dir"]}
    if is_finished(directory):
        manifest = read_manifest(directory)
        return row | {"status": "done", "metrics": manifest.metrics, "seconds": manifest.seconds}
    last = last_line(directory / "job.log")
    failed = last.startswith(("failed:", "error:")) if stopped else not last.startswith("stopped:")
    return row | {"status": "failed" if failed else "stopped", "metrics": {}, "error": last}


def row_so_far(job: dict[str, Any]) -> dict[str, Any]:
    """Of a job while the sweep goes on. One with a `rung` that has come there waits, for others to come there too."""
    directory = Path(job["dir"])
    if not (directory / CONFIG).exists():
        return {"overrides": job["overrides"], "dir": job["dir"], "status": "to do", "metrics": {}}
    stands = standing(directory)
    state = "waits" if stands.state == "stopped" and "run.stop_after" in stands.why else stands.state
    row = {"overrides": job["overrides"], "dir": job["dir"], "status": state, "metrics": None}
    return row | ({"error": stands.why} if state == "failed" else {})


def live_page(place: Path, jobs: list[dict[str, Any]], what: str) -> KeptLive:
    """Inside, report.html in `place` follows the jobs; one that joins them later is on it too."""

    def write(state: str | None, every: float) -> None:
        from posttrain.reports.sweep_page import sweep_page

        sweep_page([row_so_far(job) for job in jobs], place / PAGE, state, every)

    return KeptLive(place / PAGE, write, what)


def last_line(log: Path) -> str:
    """What a job has said last."""
    lines = log.read_text(encoding="utf-8").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it never started"
