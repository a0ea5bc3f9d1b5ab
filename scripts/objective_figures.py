"""The pictures of docs/preference.md and docs/rl.md, each from short runs of the tiny model.

    python scripts/objective_figures.py preference runs/figures docs/preference.svg
    python scripts/objective_figures.py rl runs/figures docs/rl.svg

Runs that are done are not done again.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

import posttrain
from posttrain.runs.manifest import is_finished

TINY = "model=tiny train.max_length=256 train.save_steps=null eval.sets=null train.log_steps=1".split()
LOSSES = ("sigmoid", "ipo", "apo_zero", "simpo", "{sigmoid: 0.8, sft: 0.2}")
SEEDS = (0, 1)
LEARNERS = {"grpo": "vowels", "dapo": "vowels", "grpo, a constant reward": "constant"}  # what they are paid for
LEARNING_SEEDS = (0, 1, 2)
T95 = 4.303  # Student's t of two degrees of freedom
Lines = list[dict[str, Any]]


def vowel(prompts: list[str], answers: list[str]) -> list[float]:
    """A reward of 0 or 1: is the first letter of an answer a vowel?"""
    return [float(next((c for c in answer.lower() if c.isalpha()), "x") in "aeiou") for answer in answers]


def vowels(prompts: list[str], answers: list[str]) -> list[float]:
    """The share of vowels among the letters of an answer."""
    letters = [[c for c in answer.lower() if c.isalpha()] for answer in answers]
    return [sum(c in "aeiou" for c in each) / max(1, len(each)) for each in letters]


def constant(prompts: list[str], answers: list[str]) -> list[float]:
    """The same for every answer."""
    return [1.0 for _ in answers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=["preference", "rl"])
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    args = parser.parse_args()
    figure = preference(args.runs) if args.which == "preference" else rl(args.runs)
    figure.savefig(args.picture, metadata={"Date": None})


def run(stage: str, directory: Path, *words: str) -> Lines:
    """The metrics of a run, line by line."""
    if not is_finished(directory):
        posttrain.run(stage, *TINY, *words, f"run.dir={directory}")
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def column(lines: Lines, name: str) -> tuple[list[int], list[float]]:
    found = [(line["step"], line[name]) for line in lines if name in line]
    return [step for step, _ in found], [value for _, value in found]


def preference(runs: Path) -> Any:
    """Held-out log-probs of chosen and of rejected answers, by loss, and the share of pairs that are the right way round."""
    run("sft", runs / "sft", "+peft=lora", "data=python_questions", "data.max_rows=400", "train.max_steps=60", "optim.lr=1e-2")
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    for number, loss in enumerate(LOSSES):
        words = [
            "+peft=lora",
            "data=python_preferences",
            "data.max_rows=400",
            "data.eval_rows=64",
            "train.max_steps=48",
            "train.batch_size=8",
        ]
        words += ["train.grad_accum=1", "train.eval_steps=6", "optim.lr=2e-3", f"init={runs / 'sft'}", f"dpo.loss={loss}"]
        lines = run("dpo", runs / f"dpo-{number}", *words)
        for axis, name in zip(axes, ("logp_chosen", "logp_rejected", "accuracy"), strict=True):
            axis.plot(*column(lines, f"eval/{name}"), label=loss)
            print(f"{loss:<28}{name:<16}{' '.join(f'{value:9.3f}' for value in column(lines, f'eval/{name}')[1])}")
    for axis, title in zip(axes, ("log p(chosen), nats", "log p(rejected), nats", "pairs the right way round"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(LOSSES), fontsize=8)
    return figure


OF_RL = (
    "+peft=lora", "data=python_questions", "data.max_rows=300", "data.eval_rows=4", "train.max_steps=24", "train.batch_size=4",
    "train.grad_accum=2", "ppo.advantage=grpo", "ppo.samples=4", "ppo.minibatches=2", "ppo.stop_kl=null", "optim.lr=5e-3",
    "rollout.max_new_tokens=8", "reward.function=objective_figures:vowel",
)  # fmt: skip


TO_LEARN = (
    "data=python_questions", "data.max_rows=400", "data.eval_rows=4", "train.max_steps=40", "train.batch_size=4",
    "train.grad_accum=2", "ppo.advantage=grpo", "ppo.samples=8", "ppo.minibatches=2", "ppo.stop_kl=null", "optim.lr=5e-4",
    "rollout.max_new_tokens=12", "reward.gold=objective_figures:vowels",
)  # fmt: skip


def rl(runs: Path) -> Any:
    """The share of vowels in the answers of who is paid for it and who is not; and what dynamic sampling does as prompts whose
    answers are all worth the same become many."""
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    start = runs / "start"  # in full: with LoRA the toy's answers stay those of chance
    run("sft", start, "data=python_questions", "data.max_rows=400", "train.max_steps=120", "train.batch_size=8", "optim.lr=2e-3")
    for number, name in enumerate(LEARNERS):
        learning(runs, f"init={start}", name, f"C{number}", axes[0])
    for dynamic in (False, True):
        for seed in SEEDS:
            sampled(runs, dynamic, seed, axes[1])
    for axis, title in zip(axes, ("share of vowels in the answers", "prompts of 8 that teach"), strict=True):
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.18), ncols=3)
    axes[0].set_ylim(0.3, 1.02)
    return figure


def learning(runs: Path, start: str, name: str, color: str, axis: Any) -> None:
    """What is paid for and reported (the gold check) by step: each seed, their mean, and its 95 % interval."""
    loss, _, _ = name.partition(",")
    steps, found = list[int](), list[list[float]]()
    for seed in LEARNING_SEEDS:
        words = [f"ppo.loss={loss}", f"reward.function=objective_figures:{LEARNERS[name]}", f"train.seed={seed}"]
        lines = run("ppo", runs / f"{LEARNERS[name]}-{loss}-{seed}", *TO_LEARN, start, *words)
        steps, values = column(lines, "train/gold")
        found.append(smooth(values))
        axis.plot(steps, found[-1], color=color, linewidth=0.6, alpha=0.6)
    each = [(mean(some), T95 * stdev(some) / len(some) ** 0.5) for some in zip(*found, strict=True)]
    axis.plot(steps, [middle for middle, _ in each], color=color, linewidth=2, label=name)
    axis.fill_between(steps, [m - half for m, half in each], [m + half for m, half in each], color=color, alpha=0.15, linewidth=0)
    said = ["{:.3f} +- {:.3f}".format(*each[step]) for step in (3, -1)]
    print(f"{name:<26}{said[0]} in steps 1 to 4, {said[1]} in the last four; " + " ".join(f"{one[-1]:.3f}" for one in found))


def sampled(runs: Path, dynamic: bool, seed: int, axis: Any) -> None:
    """A run of dapo with or without dynamic sampling: how many prompts taught something, and how many it drew."""
    words = ["ppo.loss=dapo", f"train.seed={seed}", f"ppo.dynamic_sampling={str(dynamic).lower()}"]
    lines = run("ppo", runs / f"{'dynamic' if dynamic else 'dapo'}-{seed}", *OF_RL, *words)
    steps, _ = column(lines, "train/reward")
    taught = column(lines, "train/prompts_kept")[1] if dynamic else [8 * share for share in column(lines, "train/informative")[1]]
    drawn = sum(column(lines, "train/prompts_drawn")[1]) if dynamic else 8 * len(steps)
    look = {"color": f"C{3 + 3 * dynamic}", "linewidth": 1.2}
    look |= {} if seed else {"label": "dynamic sampling" if dynamic else "as they come"}
    axis.plot(steps, taught, **look)
    print(f"{'dynamic' if dynamic else 'as they come'}, seed {seed}: {drawn:.0f} prompts drawn, {sum(taught):.0f} taught")


def smooth(values: list[float]) -> list[float]:
    """The mean of each and up to three before it."""
    return [mean(values[max(0, i - 3) : i + 1]) for i in range(len(values))]


if __name__ == "__main__":
    main()
