"""How far from a full grid's best what `posttrain tune` chooses is, and for how many steps: four stages on the tiny model.

    python scripts/tuning_regret.py runs/regret --svg docs/tuning.svg

Every rate of the grid is trained to its end, and measured as often as tune measures. A trial that goes on is the run that never
stopped, bit for bit (tests/launch/test_tune.py), so what tune would have chosen is read off the same runs. What is done is not
done again. "By loss alone": the same without the half of the places for what is to come.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import combinations, product
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

import posttrain
from posttrain.launch.halving import best_first, forecast, half_of, places_of, rungs_of, survivors
from posttrain.launch.proposals import settings
from posttrain.runs.manifest import is_finished

STEPS, TRIALS, FACTOR = 48, 12, 3
SEEDS = (42, 1, 2)
COMMON = f"""model=tiny train.max_steps={STEPS} train.batch_size=4 train.grad_accum=1 train.max_length=256 train.save_steps=null
eval.sets=null"""
FEW = "data.max_rows=300 data.eval_rows=32"
ROWS, PAIRS, TEXTS = (f"data=python_{name} {FEW}" for name in ("questions", "preferences", "reference"))
START = "start"  # dpo and rm begin from it: SFT in full, whose answers can be told apart
TASKS = {
    "sft, LoRA": ("sft", f"+peft=lora {ROWS}", "optim.lr=1e-4..1e-1"),
    "cpt, full": ("cpt", TEXTS, "optim.lr=1e-5..1e-2"),
    "dpo, LoRA": ("dpo", f"+peft=lora init={{start}} {PAIRS}", "optim.lr=1e-5..1e-2"),
    "rm, LoRA": ("rm", f"+peft=lora init={{start}} {PAIRS}", "optim.lr=1e-5..1e-2"),
    "sft, full": ("sft", ROWS, "optim.lr=1e-5..1e-2"),
    "sft, LoRA, one row a step": ("sft", f"+peft=lora train.batch_size=1 {ROWS}", "optim.lr=1e-4..1e-1"),
}
Curves = dict[int, dict[int, float]]  # of each trial: step -> held-out loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--only", choices=list(TASKS), action="append", help="these tasks; all, where none is named")
    parser.add_argument("--seed", type=int, action="append", help="these seeds; all, where none is given")
    parser.add_argument("--svg", type=Path)
    args = parser.parse_args()
    rungs = rungs_of(STEPS, TRIALS, FACTOR)
    print(f"{TRIALS} rates of {STEPS} steps, judged after {rungs}, one in {FACTOR} goes on")
    print(
        "| task | seed | grid's best | tune's choice | regret | steps of the grid's | by loss alone | as many steps at random |"
    )
    print("|---|---|---|---|---|---|---|---|")
    drawn, start = {}, args.runs / START
    if not is_finished(start):
        posttrain.run("sft", *f"{COMMON} {ROWS} optim.lr=2e-3 run.dir={start}".split())
    for name, seed in product(TASKS, args.seed or SEEDS):
        if args.only and name not in args.only:
            continue
        stage, words, over = TASKS[name]
        words = words.format(start=start)
        rates = [each[0] for each in settings([over], TRIALS)]
        place = args.runs / f"{name.replace(',', '').replace(' ', '-')}-{seed}"
        curves = {
            i: curve(stage, f"{words} train.seed={seed}", rate, place / f"{i:02d}", rungs[0] // 2) for i, rate in enumerate(rates)
        }
        chosen, spent, out_at = halved(curves, rungs)
        final = {i: each[STEPS] for i, each in curves.items()}
        best = best_first(final)[0]
        regrets = [final[i] / final[best] - 1 for i in (chosen, halved(curves, rungs, alone=True)[0])]
        whole = spent // STEPS  # complete runs for the same steps
        chance = mean(min(final[i] for i in some) / final[best] - 1 for some in combinations(final, whole))
        cells = [f"{final[i]:.4f} at {rates[i].partition('=')[2]}" for i in (best, chosen)]
        shares = f"{regrets[0]:.2%} | {spent / (TRIALS * STEPS):.0%} | {regrets[1]:.2%} | {chance:.1%}"
        print(f"| {name} | {seed} | {' | '.join(cells)} | {shares} |".replace("%", " %"), flush=True)
        drawn.setdefault(name, (rates, curves, out_at, chosen, best))
    if args.svg:
        picture(drawn, rungs, args.svg)


def curve(stage: str, words: str, rate: str, directory: Path, every: int) -> dict[int, float]:
    """The held-out loss by step; infinite where it is no number."""
    if not is_finished(directory):
        posttrain.run(stage, *COMMON.split(), *words.split(), rate, f"train.eval_steps={every}", f"run.dir={directory}")
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    found = {line["step"]: line["eval/loss"] for line in lines if "eval/loss" in line}
    return {step: math.inf if loss is None or not math.isfinite(loss) else loss for step, loss in found.items()}


def halved(curves: Curves, rungs: list[int], alone: bool = False) -> tuple[int, int, dict[int, int]]:
    """What tune chooses, the steps it takes, and after how many each trial is out."""
    alive, out_at = list(curves), dict[int, int]()
    for rung, places in zip(rungs, places_of(len(curves), len(rungs), FACTOR), strict=True):
        scores = {i: curves[i][rung] for i in alive}
        out_at |= dict.fromkeys(alive, rung)
        half = half_of(rung, rungs[0])
        coming = {} if alone else forecast(scores, {i: curves[i][half] for i in alive}, FACTOR, rung / half)
        alive = survivors(scores, coming, places)
    return alive[0], sum(out_at.values()), out_at


def picture(drawn: dict[str, tuple[Any, ...]], rungs: list[int], path: Path) -> None:
    """Curves as far as tune has them, on those of the grid; and what all rates come to at the end."""
    figure, found = plt.subplots(1, len(drawn), figsize=(1.5 + 3.5 * len(drawn), 3.4), layout="constrained", squeeze=False)
    axes = found[0]
    for axis, (name, (rates, curves, out_at, chosen, best)) in zip(axes, drawn.items(), strict=True):
        for i, each in curves.items():
            kept = {step: loss for step, loss in each.items() if step <= out_at[i]}
            axis.plot(list(each), list(each.values()), color="0.85", linewidth=1, zorder=1)
            color = "tab:green" if i == chosen else "tab:blue"
            axis.plot(
                list(kept), list(kept.values()), color=color, linewidth=2 if i == chosen else 1.2, zorder=3 if i == chosen else 2
            )
        final = [each[STEPS] for each in curves.values() if each[STEPS] < math.inf]
        first = [each[0] for each in curves.values() if 0 in each]
        bottom, top = min(final), max(first, default=max(final))
        axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
        for rung in rungs[:-1]:
            axis.axvline(rung, color="0.6", linewidth=0.6, linestyle=":")
        axis.set_title(f"{name}: chosen {rates[chosen].partition('=')[2]}, best {rates[best].partition('=')[2]}", fontsize=9)
        axis.set_xlabel("step")
    axes[0].set_ylabel("held-out loss")
    figure.savefig(path, metadata={"Date": None})


if __name__ == "__main__":
    main()
