"""make bench-gpu: every case of benchmarks/gpu.py, ours and the peers', each in a process of its own, into a JSON and a picture.

python benchmarks/gpu_all.py [--to gpu.json] [--minutes 25] [--only 8b] [--peers trl unsloth] [--toy]

Cases go in the order in which they are worth most, ours before the peers', and none is begun after so many minutes; those left
out are named in it. Where the file is there already, and of the same card and libraries, its cases stay, and only the others are
run. What fails, or has no tool installed, stands there with its last line. Goals (gpu_goals.py) are compared with what was found.
--toy: the same on small shapes, for a CPU.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

from gpu_goals import judged
from posttrain.runs.identity import library_versions

SCRIPT = Path(__file__).with_name("gpu.py")
SAID = 12  # last lines of a case that failed
PEERS = ("trl", "trl-best", "unsloth", "torchtune")
LORA, QLORA, FULL = "--quant none", "--quant nf4", "--full --tokens 4096"
# (name, words for gpu.py, which peers do the same)
CASES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("8b lora", f"--shape 8b {LORA}", PEERS),
    ("8b qlora", f"--shape 8b {QLORA}", PEERS),
    ("8b qlora, least memory", f"--shape 8b {QLORA} --tokens 2048 --documents 1 --recompute 32", ()),
    ("8b qlora, 24 GB", f"--shape 8b {QLORA} --tokens 8192 --cap 24", ("unsloth", "torchtune")),
    ("8b qlora, 24 GB, longest", f"--shape 8b {QLORA} --offload activations --cap 24 --longest 131072", ()),
    ("65b qlora, 48 GB", f"--shape 65b {QLORA} --tokens 2048 --documents 1 --rank 64 --recompute 80 --cap 48", ()),
    ("8b dpo qlora", f"--shape 8b {QLORA} --stage dpo", ()),
    ("8b rollout", "--shape 8b --rollout --documents 32", ()),
    ("8b ppo update, qlora", f"--shape 8b {QLORA} --stage ppo", ()),
    ("1b full", f"--shape 1b {FULL}", PEERS),
    ("8b rollout by generate", "--shape 8b --generate --documents 32", ()),
    ("8b rm qlora", f"--shape 8b {QLORA} --stage rm", ()),
    ("8b qlora, one row", f"--shape 8b {QLORA} --tokens 2048 --documents 1", PEERS),
    ("30b-moe lora", f"--shape 30b-moe {LORA} --tokens 4096", ("trl",)),
    ("1b lora", f"--shape 1b {LORA} --tokens 16384", PEERS),
    ("8b qlora, dense copies", f"--shape 8b {QLORA} --tokens 2048 --documents 1 --dense 32", ()),
)
TOY: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("toy lora", "--shape toy --tokens 128 --documents 2", ("trl", "unsloth")),
    ("toy longest", "--shape toy --longest 256", ()),
    ("toy full", "--shape toy --full --tokens 128 --documents 2", ()),
    ("toy-moe lora", "--shape toy-moe --tokens 128 --documents 2", ()),
    ("toy fails", "--shape toy-moe --quant nf4", ()),
)


def run_case(words: str, timeout: float) -> dict[str, Any]:
    """What gpu.py prints with these words, or why it prints nothing."""
    try:
        done = subprocess.run([sys.executable, str(SCRIPT), *words.split()], capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired:
        return {"failed": f"not done after {timeout:.0f} s"}
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        return {"failed": lines[-1] if lines else f"exit code {done.returncode}", "said": lines[-SAID:]}
    return json.loads(done.stdout.splitlines()[-1])


def run_all(
    cases: tuple[tuple[str, str, tuple[str, ...]], ...],
    minutes: float,
    asked: Collection[str] = PEERS,
    before: Collection[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Ours of every case, which the goals are about, then the others that are asked for; the ratio of ours to each, by the
    medians and by the worst of both spreads. before: cases that need not be run again, and any others that stay in the report."""
    ends, left = time.monotonic() + 60 * minutes, list[str]()
    found, measured = list(before), {(each["case"], each["contender"]) for each in before}
    ours = [(name, words, "posttrain") for name, words, _ in cases]
    theirs = [(name, f"{words} --peer {peer}", peer) for name, words, peers in cases for peer in peers if peer in asked]
    for name, words, contender in (*ours, *theirs):
        if (name, contender) in measured:
            continue
        rest = ends - time.monotonic()
        if rest <= 0:
            left.append(f"{name}: {contender}")
            continue
        result = run_case(words, max(60.0, rest))
        found.append({"case": name, "contender": contender, **{k: v for k, v in result.items() if k != "contender"}})
        print(json.dumps(found[-1]), flush=True)
    about = {"date": time.strftime("%Y-%m-%d"), "libraries": library_versions()}
    return {**about, "cases": found, "left_out": left, "ratios": ratios(found), "goals": judged(found)}


def measured_before(path: Path) -> list[dict[str, Any]]:
    """Of a report that is there, the cases that did not fail, were they of this card and these libraries."""
    if not path.exists():
        return []
    report = json.loads(path.read_text(encoding="utf-8"))
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    if report["libraries"] != library_versions():
        return []
    return [each for each in report["cases"] if "failed" not in each and each.get("device") == card]


def ratios(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ours over each peer's tokens a second, of cases that both have."""
    ours = {each["case"]: each for each in found if each["contender"] == "posttrain" and "spread" in each}
    pairs = [
        (ours[each["case"]], each)
        for each in found
        if each["contender"] != "posttrain" and "spread" in each and each["case"] in ours
    ]
    return [
        {
            "case": a["case"], "peer": b["contender"], "ratio": a["tokens_per_second"] / b["tokens_per_second"],
            "spread": [a["spread"][0] / b["spread"][1], a["spread"][1] / b["spread"][0]],
        }
        for a, b in pairs
    ]  # fmt: skip


def draw(report: dict[str, Any], path: Path) -> None:
    """Tokens a second by case and contender; below, how far each goal is reached."""
    import matplotlib

    matplotlib.use("svg")
    from matplotlib import pyplot

    there, goals = [each for each in report["cases"] if "tokens_per_second" in each], report["goals"]
    parts = [max(1, len(there)), max(1, len(goals))]
    figure, (speeds, aims) = pyplot.subplots(2, figsize=(9, 2 + 0.35 * sum(parts)), height_ratios=parts)
    speeds.barh([f"{each['case']}: {each['contender']}" for each in there], [each["tokens_per_second"] for each in there])
    speeds.set_xlabel("tokens a second")
    aims.barh([f"{each['goal']}: {each['state']}" for each in goals], [each["share"] or 0.0 for each in goals])
    aims.axvline(1.0, color="#444444", linewidth=1)
    aims.set_xlabel("of the goal")
    for axes in (speeds, aims):
        axes.invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=Path("gpu.json"))
    parser.add_argument("--minutes", type=float, default=25.0)
    parser.add_argument("--only", default="", help="cases whose name has this in it")
    parser.add_argument("--peers", nargs="*", default=list(PEERS), choices=PEERS, help="which others are run beside it")
    parser.add_argument("--toy", action="store_true")
    options = parser.parse_args()
    cases = tuple(case for case in (TOY if options.toy else CASES) if options.only in case[0])
    report = run_all(cases, options.minutes, options.peers, measured_before(options.to))
    options.to.parent.mkdir(parents=True, exist_ok=True)
    options.to.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    draw(report, options.to.with_suffix(".svg"))
    for goal in report["goals"]:
        print(f"{goal['goal']}: {goal['state']} ({goal['says']})")
    print(f"wrote {options.to} and {options.to.with_suffix('.svg')}")


if __name__ == "__main__":
    main()
