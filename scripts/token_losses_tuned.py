"""The losses of sft, each at its own learning rate: held-out loss and answers, three seeds. docs/optimizers.md has the table.

    python scripts/token_losses_tuned.py runs/token_losses

The toy of methods_tuned.py, which has learnt to answer, goes on in full with other questions. The rate is searched by the plain
held-out loss with the first seed; `--model smollm2` takes another model, from its released weights. What is done stays.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import mean
from typing import Any

import posttrain
from methods_tuned import FIRST_RUN, SEEDS, rate_of, searched, spelt
from posttrain.runs.manifest import is_finished

LOSSES = {
    "nll": "",
    "dft": "sft.loss=dft",
    "label smoothing 0.1": "sft.label_smoothing=0.1",
    "z-loss 1e-4": "sft.z_loss=1e-4",
    "NEFTune 5": "sft.neftune_noise_alpha=5",
    "NEFTune 0.5": "sft.neftune_noise_alpha=0.5",  # the usual 5 is as large as the toy's embeddings
}
COMMON = """data=python_questions data.skip_rows=400 data.max_rows=600 data.eval_rows=64 train.max_steps=32 train.batch_size=8
train.grad_accum=1 train.max_length=256 train.save_steps=null eval.generate.prompts=32 eval.generate.metrics=[rouge_l]
eval.generate.max_new_tokens=32"""  # 64 questions of other topics are held out
FIRST, LOWEST = 27.0, 3.0  # of the default: the first rate, and the least that is tried
FIGURES = ("eval/loss", "general/loss", "answers/rouge_l")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--model", help="in place of the toy")
    args = parser.parse_args()
    start = [f"model={args.model}"] if args.model else [f"init={args.runs / 'start'}"]
    if not args.model and not is_finished(args.runs / "start"):
        posttrain.run("sft", *FIRST_RUN.split(), f"run.dir={args.runs / 'start'}")
    found = {name: tuned(args.runs, start, name) for name in LOSSES}
    table(found)
    print("\nAll at the rate of nll:\n")
    table({name: figures([one(args.runs, start, name, found["nll"]["factor"], seed) for seed in SEEDS]) for name in LOSSES})


def table(found: dict[str, dict[str, Any]]) -> None:
    print("| loss | rate | held-out plain loss | less than nll | general text | ROUGE-L of answers | more than nll |")
    print("|---|---|---|---|---|---|---|")
    plain = found["nll"]
    for name, each in found.items():
        less = [one - other for one, other in zip(plain["eval/loss"], each["eval/loss"], strict=True)]
        more = [other - one for one, other in zip(plain["answers/rouge_l"], each["answers/rouge_l"], strict=True)]
        told = ["", ""] if name == "nll" else [spelt(less, "{:+.3f}"), spelt(more, "{:+.3f}")]
        cells = [f"{each['rate']:.2g}", spelt(each["eval/loss"], "{:.3f}"), told[0], f"{mean(each['general/loss']):.3f}"]
        print(f"| {name} | {' | '.join([*cells, spelt(each['answers/rouge_l'], '{:.3f}'), told[1]])} |")


def tuned(runs: Path, start: list[str], name: str) -> dict[str, Any]:
    """A loss at its own rate: the rate, and every figure by seed."""
    factor, done = searched(name, FIRST, lambda factor, seed: one(runs, start, name, factor, seed), LOWEST)
    return figures(done) | {"factor": factor}


def figures(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the runs of a loss."""
    return {"rate": done[0]["lr"]} | {figure: [each["metrics"][figure] for each in done] for figure in FIGURES}


def one(runs: Path, start: list[str], name: str, factor: float, seed: int) -> dict[str, Any]:
    """The manifest of a run, and its learning rate."""
    directory = runs / f"{name.replace(' ', '-')}-{factor:.3g}-{seed}"
    if not is_finished(directory):
        words = [*start, *LOSSES[name].split(), f"optim.lr_factor={factor:.4g}", f"train.seed={seed}", f"run.dir={directory}"]
        posttrain.run("sft", *COMMON.split(), *words)
    return json.loads((directory / "manifest.json").read_text()) | {"lr": rate_of(directory)}


if __name__ == "__main__":
    main()
