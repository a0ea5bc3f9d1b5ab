"""What a job of a sweep costs beside its training: the same tiny jobs, each in a new process, and forked from a warm one.

    python scripts/sweep_overhead.py --jobs 100

Seconds a job by the clock, and of processor time, which a loaded machine does not change. Training is one step of half a million
parameters: what is measured is the start, the reading, the reports.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

TINY = [
    "model=tiny",
    "train.max_steps=1",
    "train.batch_size=2",
    "data.max_rows=24",
    "data.eval_rows=4",
    "eval.rows=2",
    "+peft=lora",
]


def sweep(jobs: int, warm: bool, place: Path) -> tuple[float, float, list[float]]:
    """Seconds by the clock and of the processors, all jobs together, and the held-out losses."""
    seeds = ",".join(str(seed) for seed in range(jobs))
    words = [*TINY, f"train.seed={seeds}", f"run.dir={place}", f"run.warm={str(warm).lower()}"]
    began, before = time.monotonic(), _processors()
    subprocess.run([sys.executable, "-P", "-m", "posttrain", "sft", "-m", *words], check=True, stdout=subprocess.DEVNULL)
    rows = json.loads((place / "sweep.json").read_text())
    return time.monotonic() - began, _processors() - before, [row["metrics"]["eval/loss"] for row in rows]


def _processors() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    """Both ways, one after the other, on the same machine."""
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("--jobs", type=int, default=100)
    jobs = options.parse_args().jobs
    print(f"{jobs} jobs each way; load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    losses: list[list[float]] = []
    with tempfile.TemporaryDirectory() as place:
        for name, warm in (("warm", True), ("fresh", False)):
            clock, processors, found = sweep(jobs, warm, Path(place) / name)
            losses.append(found)
            print(f"{name:<6}{clock / jobs:6.2f} s a job by the clock, {processors / jobs:6.2f} s of processor time", flush=True)
    print("the same losses" if losses[0] == losses[1] else "the losses are not the same")


if __name__ == "__main__":
    main()
