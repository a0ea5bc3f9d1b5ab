"""Stops and goes on runs of several processes, in every way, for every stage and method: which end with other bits than a run
that was not stopped?

    python scripts/resume_matrix.py --processes 1 2 4 --json runs/resume.json

A way: `stop` (run.stop_after), `term` (SIGTERM to all), `kill` (SIGKILL to the last process). What is in the file already is not
tried again, so it can be stopped itself. Exit code 1 where something differs.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import itertools
import json
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from posttrain.config.compose import compose_run
from posttrain.errors import UserError
from posttrain.runs.files import sha256
from ranks import Kill, Nursery, Ranks

COMMON = ("model=tiny", "train.max_steps=4", "train.batch_size=1", "train.save_steps=2", "train.log_steps=3")
TEXT = ("data.max_rows=20", "data.eval_rows=2", "eval.sets=null", "train.max_length=256")
PICTURES = ("data.instance_prompt=a sks dog", "sample.images=0", "eval.images=1", "eval.levels=2", "prior.weight=0")
DROPOUT = ("+peft=lora", "peft.dropout=0.1")
STAGES = {
    "cpt": DROPOUT,
    "sft": DROPOUT,
    "rm": DROPOUT,
    "dpo": DROPOUT,
    "ppo": (*DROPOUT, "rollout.max_new_tokens=8", "reward.function=posttrain.rewards:brevity", "ppo.epochs=2"),
    "grpo": (
        *DROPOUT,
        "rollout.max_new_tokens=8",
        "reward.function=posttrain.rewards:brevity",
        "ppo.advantage=grpo",
        "ppo.samples=2",
    ),
    "dreambooth": DROPOUT,
}
METHODS = (
    "none", "full", "lora", "qlora", "rslora", "dora", "loraplus", "pissa", "vera", "adalora", "adapter", "prompt", "prefix",
    "ptuning", "partial", "head",
)  # fmt: skip
WAYS: dict[str, Callable[[int], Kill | None]] = {
    "stop": lambda last: None,
    "term": lambda last: Kill(None, signal.SIGTERM, "checkpoints/step-000002"),
    "kill": lambda last: Kill(last, signal.SIGKILL, "checkpoints/step-000002"),
}


def config(stage: str, home: Path, *words: str) -> dict[str, Any]:
    """A small run of `stage`; its pictures, if it needs any, lie in `home`."""
    if stage != "dreambooth":
        return compose_run("ppo" if stage == "grpo" else stage, [*COMMON, *TEXT, *words])
    (home / "photographs").mkdir(exist_ok=True, parents=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(home / "photographs" / f"{i}.png")
    return compose_run(stage, [*COMMON, *PICTURES, f"data.instance_dir={home}/photographs", *words])


def stopping(config: dict[str, Any], after: int) -> dict[str, Any]:
    """The run, stopped after so many steps."""
    return config | {"run": config["run"] | {"stop_after": after}}


def left(run: Path, steps: int = 4) -> dict[str, Any]:
    """All that may not depend on a stop: result, last checkpoint, figures."""
    result = next(run / name for name in ("adapter", "model") if (run / name).exists())
    last = run / "checkpoints" / f"step-{steps:06d}"
    files = [*sorted(result.glob("*.safetensors")), *sorted(last.glob("*.safetensors"))]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{name: value for name, value in line.items() if not name.endswith("per_second")} for line in lines]
    return {p.name: sha256(p) for p in files} | {"figures": figures}


def tried(nursery: Nursery, asked: dict[str, Any], home: Path, processes: int, way: str) -> str:
    """What came of a run that was stopped in this way and started again: `same`, or what is wrong. home/straight is made once."""
    straight, hurt = home / "straight", home / way
    if not straight.exists():
        whole = nursery.run(asked, straight, processes)
        if any(whole.codes):
            return f"the run itself ends with {whole.codes}: {_last(whole)}"
    kill = WAYS[way](processes - 1)
    first = nursery.run(asked if kill else stopping(asked, 1), hurt, processes, kill)
    if not any(first.codes):
        return "too fast to be stopped"
    ended = nursery.run(asked, hurt, processes)
    if any(ended.codes):
        return f"exit {first.codes}, then {ended.codes}: {_last(ended)}"
    if "going on from step" not in ended.said[0]:
        return f"exit {first.codes}, then from the beginning"
    return "same" if left(hurt) == left(straight) else f"exit {first.codes}, then other bits"


def _last(ended: Ranks) -> str:
    """The last line of each process that said something."""
    return " | ".join(f"rank {rank}: {said.strip().splitlines()[-1]}" for rank, said in enumerate(ended.said) if said.strip())


def cases(counts: list[int]) -> list[tuple[str, tuple[str, ...], int]]:
    """Names, words and number of processes: each stage with LoRA and dropout, SFT with each method, and what shards, sharded."""
    found = [(stage, (stage, *words)) for stage, words in STAGES.items()]
    found += [(f"sft {method}", ("sft", *([f"+peft={method}"] if method != "none" else []))) for method in METHODS]
    sharded = [(f"{name} sharded", (*words, "train.fsdp=true")) for name, words in found]
    plain = [(name, words, count) for (name, words), count in itertools.product(found, counts)]
    return plain + [(name, words, count) for (name, words), count in itertools.product(sharded, counts) if count > 1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--json", type=Path, default=Path("runs/resume.json"))
    parser.add_argument("--only", default="", help="cases whose name has this")
    asked = parser.parse_args()
    asked.json.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, str] = json.loads(asked.json.read_text()) if asked.json.exists() else {}
    with Nursery() as nursery:
        for name, words, count in cases(asked.processes):
            if asked.only not in name:
                continue
            home = Path(tempfile.mkdtemp(prefix="resume-"))
            try:
                composed = config(words[0], home, *words[1:])
            except UserError as error:
                found[f"{name}, {count}"] = f"refused: {error}"
                continue
            for way in asked.ways:
                key, begun = f"{name}, {count}, {way}", time.monotonic()
                if key not in found:
                    with contextlib.redirect_stdout(io.StringIO()):  # what the runs say
                        found[key] = tried(nursery, composed, home, count, way)
                    print(f"{key}: {found[key]} ({time.monotonic() - begun:.0f} s)", flush=True)
                    asked.json.write_text(json.dumps(found, indent=1))
            shutil.rmtree(home)
    wrong = {key: value for key, value in found.items() if value != "same" and not value.startswith("refused")}
    refused = sum(value.startswith("refused") for value in found.values())
    print(f"{len(found) - refused} tried, {len(wrong)} not the same, {refused} refused")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
