"""Each method at its own learning rate: a search by the first of three seeds. docs/methods.md has the command.

    python scripts/methods_tuned.py runs/methods_tuned --svg docs/methods_tuned.svg

The search goes up or down from the first rate as long as the loss falls. The three seeds are the same for all methods: the same
rows in the same order. What is done is not done again.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

import posttrain
from posttrain.runs.manifest import is_finished

METHODS = ("lora", "none", "dora", "pissa", "rslora", "qlora", "hira", "gralora", "shira", "oft", "miss", "lokr", "ia3")
# a toy that has learnt to answer, of half a million weights, reads other texts
FIRST_RUN = """model=tiny data=python_questions data.max_rows=400 train.max_steps=120 train.batch_size=8 train.max_length=256
train.save_steps=null eval.sets=null optim.lr=2e-3"""
COMMON = """data=python_reference data.eval_rows=4 train.max_steps=32 train.batch_size=4
train.grad_accum=1 train.max_length=256 train.save_steps=null eval.sets=null"""
FIRST, APART = 9.0, 3.0  # of the method's default: the first rate, and how far one is from the next
SEEDS = (1, 2, 3)  # the first is the search's
T95 = 4.303  # Student's t of two degrees of freedom


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", choices=METHODS, action="append", help="these methods; all, where none is named")
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    if not is_finished(args.runs / "start"):
        posttrain.run("sft", *FIRST_RUN.split(), f"run.dir={args.runs / 'start'}")
    found = {method: tuned(args.runs, method) for method in args.only or METHODS}
    found = dict(sorted(found.items(), key=lambda each: mean(each[1]["losses"])))
    lora = found.get("lora", next(iter(found.values())))["losses"]
    print("| `peft=` | rate, of the default | held-out loss, three seeds | less than lora | parameters |")
    print("|---|---|---|---|---|")
    for method, each in found.items():
        less = [one - other for one, other in zip(lora, each["losses"], strict=True)]
        cells = [f"{each['rate']:.2g}, x {each['factor']:.2g}", spelt(each["losses"], "{:.3f}")]
        cells += ["" if method == "lora" else spelt(less, "{:+.3f}"), f"{each['trained']:,}"]
        print(f"| {name(method)} | {' | '.join(cells)} |")
    if args.svg:
        picture(found, args.svg)


def name(method: str) -> str:
    return "full" if method == "none" else method


def spelt(values: list[float], form: str) -> str:
    """The mean and its 95 % interval."""
    return f"{form.format(mean(values))} ± {half(values):.3f}"


def half(values: list[float]) -> float:
    return T95 * stdev(values) / math.sqrt(len(values))


def searched(
    label: str, first: float, run: Callable[[float, int], dict[str, Any]], lowest: float = 0.0
) -> tuple[float, list[dict[str, Any]]]:
    """The best factor of the default rate by the search's seed, and all seeds' manifests there. run: of a factor and a seed.
    lowest: no factor below it is tried."""
    losses: dict[int, float] = {}  # by how many times APART

    def loss(power: int) -> float:
        losses.setdefault(power, run(first * APART**power, SEEDS[0])["metrics"].get("eval/loss") or math.inf)
        return losses[power]

    best = 0
    for way in (1, -1):
        while first * APART ** (best + way) >= lowest and loss(best + way) < loss(best):
            best += way
    print(f"{label}: {', '.join(f'{first * APART**p:.3g}: {losses[p]:.4f}' for p in sorted(losses))}", flush=True)
    factor = first * APART**best
    return factor, [run(factor, seed) for seed in SEEDS]


def tuned(runs: Path, method: str) -> dict[str, Any]:
    """A method at its own rate."""
    factor, done = searched(name(method), FIRST, lambda factor, seed: one(runs, method, factor, seed))
    metrics = [each["metrics"]["eval/loss"] for each in done]
    return {"factor": factor, "rate": done[0]["lr"], "losses": metrics, "trained": done[0]["trainable"]["trained"]}


def one(runs: Path, method: str, factor: float, seed: int) -> dict[str, Any]:
    """The manifest of a run, and its learning rate."""
    directory = runs / f"{name(method)}-{factor:.3g}-{seed}"
    if not is_finished(directory):
        method_word = [] if method == "none" else [f"+peft={method}"]
        words = [
            f"init={runs / 'start'}",
            *method_word,
            f"optim.lr_factor={factor:.4g}",
            f"train.seed={seed}",
            f"run.dir={directory}",
        ]
        posttrain.run("cpt", *COMMON.split(), *words)
    return json.loads((directory / "manifest.json").read_text()) | {"lr": rate_of(directory)}


def rate_of(directory: Path) -> float:
    """After the warm-up: the highest of the run."""
    lines = (json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines())
    return max(line["train/lr"] for line in lines if "train/lr" in line)


def picture(found: dict[str, dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 0.4 + 0.32 * len(found)), layout="constrained")
    for place, each in enumerate(reversed(found.values())):
        axes.errorbar(mean(each["losses"]), place, xerr=half(each["losses"]), color="0.6", capsize=3, zorder=1)
        axes.scatter(each["losses"], [place] * len(each["losses"]), color="tab:blue", s=16, zorder=2)
    axes.set_yticks(range(len(found)), [name(method) for method in reversed(found)])
    axes.set_xlabel("held-out loss: three seeds, 95 % interval of their mean")
    axes.grid(axis="x", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
