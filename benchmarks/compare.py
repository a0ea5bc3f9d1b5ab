"""posttrain beside what one would run instead, on the same rows, in turn, several times: ratios into docs/benchmarks.md.

python benchmarks/compare.py [--stages sft,dpo] [--rounds 3] [--rows 16] [--growth] [--out docs/benchmarks.md]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from gpu_goals import page
from posttrain.models.hub import resolve
from rows import write_rows

HERE = Path(__file__).resolve().parent
SPARE = {"posttrain_spare": "posttrain, recomputing"}
CONTENDERS = {"trl_defaults": "TRL, its defaults", "trl_best": "TRL, its best flags", "posttrain": "posttrain"} | SPARE
OF_PPO = {"trl_defaults": "plain loop, float32", "trl_best": "plain loop, bfloat16", "posttrain": "posttrain"} | SPARE
STAGES = {"cpt": "CPT", "sft": "SFT", "dpo": "DPO", "rm": "RM", "ppo": "PPO"}
COLOURS = ("#b8b8b8", "#7d8ca3", "#2f6fb0", "#9fc3e6")
Results = dict[tuple[str, str], list[dict[str, Any]]]
Growth = list[tuple[str, float, float]]

PAGE = """# Benchmarks

LoRA (rank 8 on all linear layers) of SmolLM2-135M, batch 4, one epoch over {rows} ragged rows whose lengths follow
Alpaca's, on a CPU. Every contender is a process of its own, and they take turns: {rounds} rounds. A figure is the median over the
rounds of a ratio within a round, with the smallest and the largest in brackets. The machine is noisy; a ratio is less so.

    {command}

{date}: {cores} cores ({processor}), torch {torch}, transformers {transformers}, trl {trl}, peft {peft}.

![Steps, times as fast](benchmarks.svg)

{tables}

- *steps*: forward, backward and optimizer over the same rows, so this is the ratio of real (unpadded) tokens per second.
- *whole command*: from the first import to the saved adapter, with tokenising, loading and, for DPO, the reference.
- *memory*: the highest resident memory of the process; less is better.
- *mean loss*: over all steps. The batches are in another order, so it agrees only roughly.
  `tests/stages/test_trl_parity.py` checks that the losses are equal step by step.

TRL's defaults are float32 weights under bfloat16 autocast, and gradient checkpointing. Its best flags here are bfloat16
weights, no checkpointing, rows grouped by length (SFT), packed blocks in which documents see one another (CPT; its packing
that keeps them apart needs FlashAttention), and reference log-probs computed beforehand (DPO). posttrain runs with its
defaults, under which nothing is computed twice while memory allows. *Recomputing* is
`train.gradient_checkpointing=true`, which takes the least memory and is what TRL's defaults do.
{ppo}{growth}{gpu}"""

PPO = """
TRL has no PPO any more. `benchmarks/plain_ppo.py` takes its place, the loop that one writes with transformers and peft:
separate policy and value models, `generate`, padded batches, whole logits. Two steps of 8 prompts, {new_tokens} new tokens,
two epochs of two updates.
"""

GROWTH = """
## How it grows

Seconds of all SFT steps, divided by those of the first row of each pair, for TRL's defaults and posttrain. One run each,
{rows} rows unless the table says otherwise.

| | TRL, its defaults | posttrain | posttrain, times as fast |
|---|---|---|---|
{lines}
"""


def measure(name: str, stage: str, rows: Path, model_dir: Path, batch: int = 4, rank: int = 8) -> dict[str, Any]:
    """Run one contender; a fresh cache, so that nothing is left from an earlier round."""
    with tempfile.TemporaryDirectory() as cache:
        environment = {**os.environ, "POSTTRAIN_CACHE": cache, "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": cache}
        command = [sys.executable, str(HERE / "contenders.py"), name, stage, str(rows), str(model_dir), str(batch), str(rank)]
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{name} {stage} failed:\n{done.stderr[-3000:]}")
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


def run_rounds(stages: list[str], rounds: int, paths: dict[str, Path], model_dir: Path) -> Results:
    found: Results = {(name, stage): [] for stage in stages for name in CONTENDERS}
    for number in range(rounds):
        for stage in stages:
            for name in CONTENDERS:
                result = measure(name, stage, paths[stage], model_dir)
                found[name, stage].append(result)
                print(f"round {number + 1}  {stage}  {name:<13}", json.dumps(result), flush=True)
    return found


def ratios(found: Results, name: str, stage: str, of: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
    """`of(its own, TRL's defaults')`, round by round."""
    return [of(own, base) for own, base in zip(found[name, stage], found["trl_defaults", stage], strict=True)]


def cell(values: list[float]) -> str:
    """Median (smallest - largest)."""
    return f"{statistics.median(values):.2f} ({min(values):.2f} - {max(values):.2f})"


def speed(figure: str) -> Callable[[dict[str, Any], dict[str, Any]], float]:
    return lambda own, base: base[figure] / own[figure]


def table(found: Results, stage: str) -> str:
    lines = [f"## {STAGES[stage]}", ""]
    lines += ["| | steps, times as fast | whole command, times as fast | memory, share of | mean loss |", "|---|---|---|---|---|"]
    for name, title in (OF_PPO if stage == "ppo" else CONTENDERS).items():
        cells = [
            cell(ratios(found, name, stage, speed("steps"))),
            cell(ratios(found, name, stage, speed("whole"))),
            cell(ratios(found, name, stage, lambda own, base: own["peak"] / base["peak"])),
            f"{statistics.mean(r['loss'] for r in found[name, stage]):.3f}",
        ]
        lines.append(f"| {title} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", " ".join(remarks(found, stage))])


def remarks(found: Results, stage: str) -> list[str]:
    own = found["posttrain", stage]
    pairs = list(zip(found["trl_best", stage], own, strict=True))
    said = [f"{own[0]['tokens']:,} tokens a run."] if stage != "ppo" else []
    if stage == "cpt":
        said.append(
            "posttrain and TRL's best flags train on full packs, so in fewer steps than TRL's defaults, which take four rows."
        )
    best = statistics.median(theirs["steps"] / ours["steps"] for theirs, ours in pairs)
    against = OF_PPO["trl_best"] if stage == "ppo" else "TRL's best flags"
    said.append(f"Against {against} posttrain's steps are {best:.2f} times as fast.")
    if "floor_share" in own[0]:
        share = statistics.median(each["floor_share"] for each in own)
        said.append(
            f"The matrix products that such a step needs at least, at the rate of this machine's bfloat16 matmul (measured in "
            f"the same process), would take {share:.0%} of the time of the steps."
        )
    for part in ("rollout", "update"):
        rate = f"{part}_tokens_per_second"
        if rate in own[0]:
            factor = statistics.median(ours[rate] / theirs[rate] for theirs, ours in pairs)
            said.append(f"The {part} alone has {factor:.2f} times its tokens per second.")
    return said


def picture(found: Results, stages: list[str], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 2.8))
    for i, (name, title) in enumerate(CONTENDERS.items()):
        values = [ratios(found, name, stage, speed("steps")) for stage in stages]
        middle = [statistics.median(each) for each in values]
        spread = [
            [m - min(v) for m, v in zip(middle, values, strict=True)],
            [max(v) - m for m, v in zip(middle, values, strict=True)],
        ]
        places = [x + 0.21 * (i - 1.5) for x in range(len(stages))]
        axes.bar(places, middle, 0.2, yerr=spread, label=title, color=COLOURS[i], ecolor="#444444")
    axes.set_xticks(range(len(stages)), [STAGES[stage] + (" (plain loop)" if stage == "ppo" else "") for stage in stages])
    axes.set_ylabel("steps, times as fast")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.tight_layout()
    pyplot.rcParams["svg.hashsalt"] = "posttrain"
    figure.savefig(path, metadata={"Date": None})


def grow(folder: Path, count: int, model_dir: Path) -> tuple[str, int]:
    """SFT at other lengths, batches, ranks and numbers of rows."""
    variants = {
        "rows": [(f"{n} rows", {"count": n}, {}) for n in (count, 2 * count)],
        "length": [(f"lengths x {s}", {"scale": s}, {}) for s in (1.0, 2.0)],
        "batch": [(f"batch {b}", {}, {"batch": b}) for b in (1, 4)],
        "rank": [(f"rank {r}", {}, {"rank": r}) for r in (8, 64)],
    }
    lines = []
    for rows in variants.values():
        first: dict[str, float] = {}
        for title, of_rows, of_run in rows:
            path = write_rows(folder / title, **{"count": count, **of_rows})["sft"]
            seconds = {name: measure(name, "sft", path, model_dir, **of_run)["steps"] for name in ("trl_defaults", "posttrain")}
            first = first or seconds
            shares = [f"{seconds[name] / first[name]:.2f}" for name in seconds]
            lines.append(f"| {title} | {' | '.join(shares)} | {seconds['trl_defaults'] / seconds['posttrain']:.2f} |")
            print(lines[-1], flush=True)
    return "\n".join(lines), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--growth", action="store_true", help="also how the cost grows with rows, length, batch and rank")
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "benchmarks.md")
    options = parser.parse_args()
    stages = options.stages.split(",")
    model_dir = resolve("smollm2", None).directory
    with tempfile.TemporaryDirectory() as folder:
        found = run_rounds(stages, options.rounds, write_rows(Path(folder), options.rows), model_dir)
        lines, count = grow(Path(folder), max(8, options.rows // 2), model_dir) if options.growth else ("", 0)
    picture(found, stages, options.out.with_suffix(".svg"))
    from contenders import NEW_TOKENS

    options.out.write_text(
        PAGE.format(
            rows=options.rows, rounds=options.rounds, cores=os.cpu_count(), processor=platform.machine(),
            date=time.strftime("%Y-%m-%d"), command=" ".join(["python benchmarks/compare.py", *sys.argv[1:]]),
            tables="\n\n".join(table(found, stage) for stage in stages),
            ppo=PPO.format(new_tokens=NEW_TOKENS) if "ppo" in stages else "",
            growth=GROWTH.format(lines=lines, rows=count) if lines else "", gpu=page(),
            **{name: version(name) for name in ("torch", "transformers", "trl", "peft")},
        )
    )  # fmt: skip
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
