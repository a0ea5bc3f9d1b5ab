"""posttrain beside TRL on the same rows, in turn, several times: ratios of speed and memory into docs/benchmarks.md.

python benchmarks/compare.py [--rounds 3] [--rows 16] [--out docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from posttrain.models.base import resolve
from rows import write_rows

HERE = Path(__file__).resolve().parent
CONTENDERS = {"trl_defaults": "TRL, its defaults", "trl_best": "TRL, its best flags", "posttrain": "posttrain"}
STAGES = {"sft": "SFT", "dpo": "DPO"}
Results = dict[tuple[str, str], list[dict[str, Any]]]

PAGE = """# Benchmarks

{stages} with LoRA (rank 8 on all linear layers) of SmolLM2-135M, batch 4, one epoch over {rows} ragged rows whose lengths follow
Alpaca's, on a CPU. Every contender is a process of its own; they take turns, {rounds} rounds. A figure is the median over the
rounds of a ratio within a round, with the smallest and the largest in brackets: the machine is noisy, a ratio is less so.

    make bench        # python benchmarks/compare.py --rounds {rounds} --rows {rows}

{cores} cores, torch {torch}, transformers {transformers}, trl {trl}, peft {peft}.

{tables}

- *steps*: forward, backward and optimizer, over the same rows, so it is the ratio of real (unpadded) tokens a second.
- *whole command*: from the first import to the saved adapter, with tokenising, loading and, for DPO, the reference.
- *memory*: the highest resident memory of the process, less is better.
- *mean loss*: over all steps; the batches differ in order, so it agrees only roughly. Step by step equality is held by
  `tests/stages/test_trl_parity.py`.

TRL's defaults: float32 weights under bfloat16 autocast and gradient checkpointing. Its best flags here: bfloat16 weights, no
checkpointing, rows grouped by length (SFT), reference log-probs computed beforehand (DPO); its packing asks for FlashAttention.
posttrain runs with its defaults.
"""


def measure(name: str, stage: str, rows: Path, model_dir: Path) -> dict[str, Any]:
    """Run one contender; a fresh cache, so that nothing is left from an earlier round."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "POSTTRAIN_CACHE": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache}
        command = [sys.executable, str(HERE / "contenders.py"), name, stage, str(rows), str(model_dir)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {stage} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def run_rounds(rounds: int, paths: dict[str, Path], model_dir: Path) -> Results:
    found: Results = {(name, stage): [] for stage in STAGES for name in CONTENDERS}
    for number in range(rounds):
        for stage in STAGES:
            for name in CONTENDERS:
                result = measure(name, stage, paths[stage], model_dir)
                found[name, stage].append(result)
                print(f"round {number + 1}  {stage}  {name:<13}", json.dumps(result), flush=True)
    return found


def ratio(found: Results, name: str, stage: str, of: Callable[[dict[str, Any], dict[str, Any]], float]) -> str:
    """Median (smallest - largest) of `of(theirs, TRL's defaults')`, round by round."""
    values = [of(own, base) for own, base in zip(found[name, stage], found["trl_defaults", stage], strict=True)]
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def table(found: Results, stage: str) -> str:
    lines = [f"## {STAGES[stage]}", ""]
    lines += ["| | steps, times as fast | whole command, times as fast | memory, share of | mean loss |", "|---|---|---|---|---|"]
    for name, title in CONTENDERS.items():
        cells = [
            ratio(found, name, stage, lambda own, base: base["steps"] / own["steps"]),
            ratio(found, name, stage, lambda own, base: base["whole"] / own["whole"]),
            ratio(found, name, stage, lambda own, base: own["peak"] / base["peak"]),
            f"{statistics.mean(r['loss'] for r in found[name, stage]):.3f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    tokens = found["posttrain", stage][0]["tokens"]
    best = statistics.median(
        own["steps"] / best["steps"]
        for own, best in zip(found["trl_best", stage], found["posttrain", stage], strict=True)
    )  # fmt: skip
    return "\n".join(
        [*lines, "", f"{tokens:,} tokens a run. Against TRL's best flags posttrain's steps are {best:.2f} times as fast."]
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    options = parser.parse_args()
    model_dir = resolve("smollm2", None).directory
    with tempfile.TemporaryDirectory() as folder:
        found = run_rounds(options.rounds, write_rows(Path(folder), options.rows), model_dir)
    libraries = {name: version(name) for name in ("torch", "transformers", "trl", "peft")}
    tables = "\n\n".join(table(found, stage) for stage in STAGES)
    options.out.write_text(
        PAGE.format(
            stages=" and ".join(STAGES.values()), rows=options.rows, rounds=options.rounds, cores=os.cpu_count(), tables=tables,
            **libraries,
        )
    )  # fmt: skip
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
