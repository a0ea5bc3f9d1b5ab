"""Much of everything, with model=tiny: `make load`, or `python scripts/load.py rows --count 10000000`; a line of JSON each.

rows    a file of short rows, streamed: does memory grow with their number?
steps   a long run: does memory grow with the steps, and can metrics.jsonl be read while it is written?
sweep   many jobs; recipe: many steps, each starting from the one before; both from a command to their page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import yaml

TINY = ("model=tiny", "eval.sets=null", "data.eval_rows=4", "train.batch_size=2", "train.grad_accum=1")
COUNTS = {"rows": 10_000_000, "steps": 100_000, "sweep": 100, "recipe": 12}


def watch(words: list[str], home: Path, each: float = 2.0, metrics: Path | None = None) -> dict[str, Any]:
    """Run the command to its end. Memory (of it and its children, in MB) at a tenth of its samples and at most; lines read of
    `metrics` while it was written."""
    environment = {**os.environ, "POSTTRAIN_CACHE": str(home / "cache"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    began, memory, read = time.monotonic(), [], 0
    with (home / "log").open("w") as log:
        child = subprocess.Popen([sys.executable, "-m", "posttrain", *words], stdout=log, stderr=log, cwd=home, env=environment)
        process = psutil.Process(child.pid)
        while child.poll() is None:
            memory.append(_resident(process))
            if metrics and metrics.exists():
                whole = metrics.read_text().split("\n")[:-1]
                read = len([json.loads(line) for line in whole])
            time.sleep(each)
    if child.returncode:
        raise SystemExit((home / "log").read_text()[-2000:])
    found = {"seconds": round(time.monotonic() - began), "early_mb": memory[len(memory) // 10], "most_mb": max(memory)}
    return found | {"late_mb": memory[-2] if len(memory) > 1 else memory[-1]} | ({"lines_read": read} if metrics else {})


def _resident(process: psutil.Process) -> int:
    """In MB; 0 for one that has just ended."""
    try:
        family = [process, *process.children(recursive=True)]
        return sum(each.memory_info().rss for each in family) >> 20
    except psutil.Error:
        return 0


def rows(count: int, home: Path) -> dict[str, Any]:
    with (home / "rows.jsonl").open("w") as file:
        for start in range(0, count, 10_000):
            numbers = range(start, min(count, start + 10_000))
            file.write("".join(f'{{"prompt": "{i} and 1? ", "completion": "{i + 1}"}}\n' for i in numbers))
    return watch(["sft", *TINY, f"data.path={home / 'rows.jsonl'}", "train.max_steps=20", "run.dir=run"], home)


def steps(count: int, home: Path) -> dict[str, Any]:
    words = ["sft", *TINY, "+peft=lora", "peft.r=2", "data.max_rows=200", "train.max_length=64", f"train.max_steps={count}"]
    words += [f"train.save_steps={count // 10}", "data.max_untrained_share=1", "run.dir=run"]
    return watch(words, home, metrics=home / "run" / "metrics.jsonl")


def sweep(count: int, home: Path) -> dict[str, Any]:
    seeds = ",".join(str(i) for i in range(count))
    found = watch(["sft", "-m", *TINY, "data.max_rows=20", "train.max_steps=2", f"train.seed={seeds}", "run.dir=sweep"], home)
    done = [row["status"] for row in json.loads((home / "sweep" / "sweep.json").read_text())]
    assert done == ["done"] * count and (home / "sweep" / "report.html").exists()
    return found


def recipe(count: int, home: Path) -> dict[str, Any]:
    stages = [("cpt", "sft", "dpo")[i % 3] for i in range(count)]
    each = {f"step{i}": {"stage": stage, "overrides": ["+peft=lora", "peft.r=2"]} for i, stage in enumerate(stages)}
    small = [*TINY, "data.max_rows=20", "train.max_steps=2", "train.max_length=256"]
    text = yaml.safe_dump({"name": "long", "description": "many steps", "overrides": small, "steps": each}, sort_keys=False)
    (home / "long.yaml").write_text(text)
    found = watch(["run", "./long.yaml", "run.dir=recipe"], home)
    assert len(list((home / "recipe").glob("*/manifest.json"))) == count and (home / "recipe" / "report.html").exists()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", default=list(COUNTS), help=", ".join(COUNTS))
    parser.add_argument("--count", type=int)
    options = parser.parse_args()
    for name in options.names:
        count = options.count or COUNTS[name]
        with tempfile.TemporaryDirectory() as folder:
            found = {"rows": rows, "steps": steps, "sweep": sweep, "recipe": recipe}[name](count, Path(folder))
        print(json.dumps({"what": name, "count": count, **found}), flush=True)


if __name__ == "__main__":
    main()
