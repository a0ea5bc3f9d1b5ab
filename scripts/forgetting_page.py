"""docs/forgetting.md's tables: what replay, EWC, LoRA, a curriculum and span weights do to SmolLM2, measured.

python scripts/forgetting_page.py --web c4.jsonl --chat alpaca.json [NAME ...]     runs what is not done yet, then writes the page

web: general text with a `text` column, of which the last fifth is held out. chat: instructions, of which the first rows are
measured on. NAME: a pattern such as 'replay full*'; --page writes the page from what is there.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
PAGE = HERE / "forgetting_page.md"
COMMAND = """python scripts/forgetting_page.py --web c4.jsonl --chat alpaca.json
    python scripts/forgetting_page.py --page"""
UNMEASURED = "Not measured yet: the command above fills this in."
SMALL = "model=smollm2 train.max_length=512 train.batch_size=2 train.grad_accum=1 train.save_steps=null data.eval_rows=16"
MEASURED = "eval.rows=24 eval.max_length=256"
DOMAIN = f"cpt {SMALL} {MEASURED} data=python_reference train.max_steps=30"
FULL = f"{DOMAIN} full_lr=5e-4"
LORA = f"{DOMAIN} +peft=lora"
COT = f"sft {SMALL} {MEASURED} +peft=lora train.max_steps=30 train.max_length=256 train.batch_size=8 cot.marker=####"

METHODS = {
    "full": FULL,
    "full at 1e-4": f"{DOMAIN} full_lr=1e-4",
    "full replay 0.3": f"{FULL} data.alpha=0.7 data.general.path=WEB",
    "full replay 0.5": f"{FULL} data.alpha=0.5 data.general.path=WEB",
    "full self-replay 0.5": f"{FULL} data.alpha=0.5",
    "full ewc 10": f"{FULL} ewc.lambda=10 ewc.path=WEB",
    "full ewc 1000": f"{FULL} ewc.lambda=1e3 ewc.path=WEB",
    "full l2": f"{FULL} ewc.lambda=1 ewc.importance=l2",
    "lora": LORA,
    "lora replay 0.5": f"{LORA} data.alpha=0.5 data.general.path=WEB",
}
SEEDS = (42, 2)
REPLAY = {f"{name} seed {seed}": f"{words} train.seed={seed}" for seed in SEEDS for name, words in METHODS.items()}
CURRICULUM = {
    f"{kind} seed {seed}": f"cpt {SMALL} {MEASURED} +peft=lora data.path=WEB train.max_steps=30 train.seed={seed} {words}"
    for seed in (1, 2)
    for kind, words in (
        ("shuffled", ""),
        ("by length", "curriculum.by=length"),
        ("by perplexity", "curriculum.by=perplexity"),
    )
}
SPANS = {
    f"reasoning {r}, answer {a}": f"{COT} data.path=SUMS cot.reasoning_weight={r} cot.answer_weight={a}"
    for r, a in ((1, 1), (0.3, 1), (1, 5), (0, 1))
}
EXPERIMENTS = {"replay": REPLAY, "curriculum": CURRICULUM, "spans": SPANS}


def directory(out: Path, group: str, name: str) -> Path:
    return out / group / name.replace(" ", "-").replace(",", "")


def prepare(out: Path, web: Path, chat: Path) -> dict[str, Path]:
    """The files that experiments name in capitals."""
    out.mkdir(parents=True, exist_ok=True)
    files = {name: out / f"{name.lower()}.jsonl" for name in ("WEB", "WEB_HELD_OUT", "CHAT", "SUMS")}
    lines = [line for line in web.read_text().splitlines() if line.strip()]
    cut = len(lines) * 4 // 5
    files["WEB"].write_text("\n".join(lines[:cut]) + "\n")
    files["WEB_HELD_OUT"].write_text("\n".join(lines[cut:]) + "\n")
    files["CHAT"].write_text("".join(json.dumps(row) + "\n" for row in json.loads(chat.read_text())[:200]))
    files["SUMS"].write_text("".join(json.dumps(row) + "\n" for row in sums(800)))
    return files


def sums(count: int) -> list[dict[str, str]]:
    """Additions with a worked way to the answer, which stands behind ####."""
    random.seed(0)
    rows = []
    for _ in range(count):
        numbers = [random.randint(10, 999) for _ in range(3)]
        first = numbers[0] + numbers[1]
        way = f"{numbers[0]} + {numbers[1]} is {first}. {first} + {numbers[2]} is {sum(numbers)}."
        rows.append({"question": f"What is {numbers[0]} + {numbers[1]} + {numbers[2]}?", "answer": f"{way}\n#### {sum(numbers)}"})
    return rows


def run(words: str, files: dict[str, Path], to: Path) -> None:
    sets = [] if words.startswith("sft") else ["eval.sets.web=WEB_HELD_OUT", "eval.sets.chat=CHAT"]
    command = [sys.executable, "-m", "posttrain", *words.split(), *sets, f"run.dir={to}"]
    for name in sorted(files, key=len, reverse=True):
        command = [word.replace(f"={name}", f"={files[name]}") for word in command]
    subprocess.run(command, check=True)


def results(out: Path, group: str) -> dict[str, dict[str, Any]]:
    found = {name: directory(out, group, name) / "manifest.json" for name in EXPERIMENTS[group]}
    return {name: json.loads(path.read_text()) for name, path in found.items() if path.exists()}


def change(metrics: dict[str, float], name: str) -> str:
    before, after = metrics[f"{name}_before"], metrics[name]
    return f"{after:.3f} ({100 * (after - before) / before:+.1f} %)"


def replay_table(found: dict[str, dict[str, Any]]) -> str:
    """A line for each method; a cell has every seed's figure."""
    lines = ["| | domain loss | general | web | chat |", "|---|---|---|---|---|"]
    for name in METHODS:
        runs = [found[key]["metrics"] for key in (f"{name} seed {seed}" for seed in SEEDS) if key in found]
        cells = ["; ".join(change(metrics, f"{each}/loss") for metrics in runs) for each in ("eval", "general", "web", "chat")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def curriculum_table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| | own held-out loss | web | general |", "|---|---|---|---|"]
    for name, manifest in found.items():
        cells = [change(manifest["metrics"], f"{each}/loss") for each in ("eval", "web", "general")]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def spans_table(found: dict[str, dict[str, Any]]) -> str:
    lines = ["| weights | log p(answer given question and reasoning) | plain held-out loss |", "|---|---|---|"]
    for name, manifest in found.items():
        metrics = manifest["metrics"]
        logp = f"{metrics['answer/logp_before']:.3f} → {metrics['answer/logp']:.3f}"
        lines.append(f"| {name} | {logp} | {metrics['plain/loss_before']:.3f} → {metrics['plain/loss']:.3f} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--web", type=Path)
    parser.add_argument("--chat", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/forgetting"))
    parser.add_argument("--page", action="store_true")
    options = parser.parse_args()
    if not options.page:
        files = prepare(options.out, options.web, options.chat)
        for group, experiments in EXPERIMENTS.items():
            for name, words in experiments.items():
                to = directory(options.out, group, name)
                wanted = not options.names or any(fnmatch(f"{group} {name}", each) for each in options.names)
                if wanted and not (to / "manifest.json").exists():
                    run(words, files, to)
        return
    tables = {"replay": replay_table, "curriculum": curriculum_table, "spans": spans_table}
    found = {group: results(options.out, group) for group in tables}
    rows = {group: tables[group](runs) if runs else UNMEASURED for group, runs in found.items()}
    page = HERE.parent / "docs" / "forgetting.md"
    page.write_text(PAGE.read_text().format(command=COMMAND, **rows))
    print(f"wrote {page}")


if __name__ == "__main__":
    main()
