"""docs/methods.md from a sweep over every method: what each learned, what it cost, and what it forgot.

posttrain sft -m model=smollm2 peft=... run.dir=runs/methods      (the whole command stands in the page)
python scripts/methods_page.py runs/methods
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("agg")
import matplotlib.pyplot as plt

COMMAND = """posttrain sft -m model=smollm2 \\
        peft=none,head,partial,lora,qlora,rslora,dora,pissa,loraplus,adalora,vera,adapter,prefix,ptuning,prompt \\
        train.max_steps=40 train.batch_size=4 train.grad_accum=1 train.max_length=256 train.save_steps=null \\
        data.eval_rows=32 eval.rows=24 eval.max_length=256 run.dir=runs/methods
    python scripts/methods_page.py runs/methods"""
HERE = Path(__file__).resolve().parent
PAGE = HERE / "methods_page.md"
BY_HAND = "## Which one"


def read(sweep: Path) -> list[dict[str, Any]]:
    """One dict a finished job, the best loss first."""
    found = []
    for row in json.loads((sweep / "sweep.json").read_text()):
        if row["status"] == "done":
            manifest = json.loads((sweep / Path(row["dir"]).name / "manifest.json").read_text())
            found.append({"method": row["overrides"]["peft"], **manifest})
    return sorted(found, key=lambda run: run["metrics"]["eval/loss"])


def name(run: dict[str, Any]) -> str:
    return "full" if run["method"] == "none" else str(run["method"])


def table(runs: list[dict[str, Any]]) -> str:
    full = next(run for run in runs if run["method"] == "none")
    lines = []
    for run in runs:
        trained, total = run["trainable"]["trained"], run["trainable"]["total"]
        cells = [
            name(run),
            f"{run['metrics']['eval/loss']:.3f}",
            f"{trained:,}",
            f"{trained / total:.2%}",
            f"{run['seconds'] / full['seconds']:.2f}",
            f"{run['peak_memory_bytes'] / full['peak_memory_bytes']:.2f}",
            f"{run['metrics']['forgetting/percent']:+.1f} %",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(runs: list[dict[str, Any]], path: Path) -> None:
    figure, axes = plt.subplots(figsize=(7, 4.2))
    for run in runs:
        x, y = run["trainable"]["trained"], run["metrics"]["eval/loss"]
        axes.scatter(x, y, color="#2257c5", s=28)
        axes.annotate(name(run), (x, y), xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.axhline(runs[0]["metrics"]["eval/loss_before"], color="#888", linewidth=1, linestyle="--")
    axes.set_xscale("log")
    axes.set_xlabel("trained parameters")
    axes.set_ylabel("held-out loss after 40 steps")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("--out", type=Path, default=HERE.parent / "docs" / "methods.md")
    options = parser.parse_args()
    runs = read(options.sweep)
    before = runs[0]["metrics"]["eval/loss_before"]
    floor = min(run["peak_memory_bytes"] for run in runs) / 1e9
    _, mark, rest = options.out.read_text().partition(BY_HAND)  # what follows the table is written by hand, and stays
    options.out.write_text(PAGE.read_text().format(command=COMMAND, before=before, rows=table(runs), floor=floor) + mark + rest)
    picture(runs, options.out.with_suffix(".svg"))
    print(f"wrote {options.out}")


if __name__ == "__main__":
    main()
