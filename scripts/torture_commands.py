"""Kills that no command may notice, beyond single runs: `make torture`, or `python scripts/torture_commands.py --count 100`.

Recipes, sweeps, merge, compose, runs that find an empty cache, and runs of two processes, all with model=tiny. Each command runs
straight through twice. Then it is killed with SIGKILL at random moments, half of the times with all that it has started, and
given again, until it ends by itself; what it leaves must be the same, bit for bit. (scripts/torture.py: every stage by itself.)
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not outlive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from ranks import Kill, Nursery
from torture import END, warm_up

TINY = ("model=tiny", "+peft=lora", "peft.r=4", "data.max_rows=30", "data.eval_rows=2", "eval.rows=1")
SHORT = (*TINY, "train.batch_size=2", "train.max_steps=4", "train.save_steps=1", "train.max_length=128")
RECIPE = "name: torn\ndescription: two stages\noverrides: [{words}]\nsteps:\n  sft:\n  dpo:\n"
TIMED = ("seconds", "per_second", "time")  # ends of figures that are timed
TRIES = 12  # kills of one command before it is left to end


@dataclass(frozen=True)
class Case:
    """words: the command line, given in an empty directory where `before` has been. cold: with a cache of its own."""

    name: str
    words: tuple[str, ...]
    before: Callable[[Path], None] = lambda home: None
    cold: bool = False


def write_recipe(home: Path) -> None:
    (home / "torn.yaml").write_text(RECIPE.format(words=", ".join(SHORT)))


def cases(runs: Path) -> list[Case]:
    """runs: where two finished runs, a and b, are."""
    return [
        Case("recipe", ("run", "torn.yaml"), write_recipe),
        Case("sweep", ("sft", "-m", *SHORT, "optim.lr=1e-3,2e-3", "run.dir=sweep")),
        Case("merge", ("merge", str(runs / "a"), "--out", "merged", "--max-kl", "9")),
        Case("compose", ("compose", str(runs / "a"), str(runs / "b"), "--out", "both", "--weights", "0.5,0.5")),
        Case("cache", ("dpo", *SHORT, "run.dir=run"), cold=True),
    ]


def start(words: tuple[str, ...], home: Path, cache: Path) -> int:
    """The command in a process, and a group, of its own; its id."""
    child = os.fork()
    if child:
        return child
    code = END
    try:
        os.setsid()
        os.chdir(home)
        os.environ["POSTTRAIN_CACHE"] = str(cache)
        target = os.open(home.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        from posttrain.cli import app

        try:
            code = app(list(words), standalone_mode=False) or 0
        except SystemExit as ended:
            code = int(ended.code or 0)
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int, kill_after: float, everything: bool) -> int:
    """How it ended, below zero where it was killed. everything: with what it has started."""
    deadline = time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            if everything:
                with suppress(ProcessLookupError):  # it has no group yet
                    os.killpg(child, signal.SIGKILL)
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)


def outcome(home: Path) -> dict[str, Any]:
    """Everything there that must not depend on how often it was killed: weights, and figures that were not timed."""
    from posttrain.runs.files import sha256

    found: dict[str, Any] = {}
    for file in sorted(home.rglob("*.safetensors")):
        found[str(file.relative_to(home))] = sha256(file)
    for file in sorted(home.rglob("metrics.jsonl")):
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[str(file.relative_to(home))] = [{k: v for k, v in line.items() if not k.endswith(TIMED)} for line in lines]
    found["left over"] = [str(p.relative_to(home)) for p in home.rglob(".*.tmp")]
    return found


class Torture:
    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.rng = home, random.Random(seed)
        self.kills, self.wrong = dict[str, int](), list[str]()

    def place(self, case: Case, number: int) -> tuple[Path, Path]:
        """An empty directory for the command, and the cache that it finds."""
        place = self.home / f"{case.name}-{number:03d}"
        place.mkdir()
        case.before(place)
        return place, self.home / f"cache-{case.name}-{number:03d}" if case.cold else Path(os.environ["POSTTRAIN_CACHE"])

    def straight(self, case: Case) -> tuple[dict[str, Any], float]:
        """What it leaves, and how long it takes where no other process has made it slow."""
        seconds = []
        for number in (0, 1000):
            place, cache = self.place(case, number)
            began = time.monotonic()
            code = ended(start(case.words, place, cache), float("inf"), False)
            if code:
                sys.exit(f"{case.name} failed without any kill (exit {code}): see {place.with_suffix('.log')}")
            seconds.append(time.monotonic() - began)
        return outcome(place), min(seconds)

    def until_it_ends(self, case: Case, number: int, expected: dict[str, Any], seconds: float) -> None:
        place, cache = self.place(case, number)
        kills, code = 0, -signal.SIGKILL
        while code == -signal.SIGKILL:
            spared = kills >= TRIES or self.rng.random() < 0.1
            after = float("inf") if spared else self.rng.random() * seconds
            code = ended(start(case.words, place, cache), after, self.rng.random() < 0.5)
            kills += code == -signal.SIGKILL
        done = code == 0 or (case.name in ("merge", "compose") and code == 2)  # the one before was killed when all was done
        said = place.with_suffix(".log").read_text()
        self.judge(case.name, kills, done and outcome(place) == expected and "is damaged" not in said, place)

    def judge(self, name: str, kills: int, same: bool, place: Path) -> None:
        self.kills[name] = self.kills.get(name, 0) + kills
        print(f"{name:<12}{kills} kills: {'the same' if same else f'WRONG, see {place}'}", flush=True)
        shutil.rmtree(place) if same else self.wrong.append(str(place))


def two_processes(torture: Torture, nursery: Nursery, number: int, expected: dict[str, Any] | None) -> dict[str, Any]:
    """A run of two, one of which is killed at a random moment of its, as often as it takes to end."""
    from posttrain.config.compose import compose_run

    place = torture.home / f"processes-{number:03d}"
    config = compose_run("sft", [*SHORT, "train.processes=2", f"run.dir={place / 'run'}"])
    kills, codes = 0, [-signal.SIGKILL]
    while any(codes):
        moments = ["config.yaml", "metrics.jsonl", *(f"checkpoints/step-{step:06d}" for step in range(1, 5))]
        left = [moment for moment in moments if not (place / "run" / moment).exists()]
        kill = Kill(torture.rng.randrange(2), signal.SIGKILL, torture.rng.choice(left)) if expected and left else None
        codes = nursery.run(config, place / "run", 2, kill).codes
        kills += any(codes)
        if kills > TRIES:
            break
    found = outcome(place)
    if expected is not None:
        torture.judge("processes=2", kills, not any(codes) and found == expected, place)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=100, help="kills, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="such as merge,compose; default: all")
    options = parser.parse_args()
    home, began = Path(tempfile.mkdtemp(prefix="posttrain-torture-")), time.monotonic()
    os.environ.setdefault("POSTTRAIN_CACHE", str(home / "cache"))
    warm_up(["sft", "dpo"])
    torture, chosen = Torture(home, options.seed), options.only.split(",") if options.only else []
    for name, seed in (("a", 1), ("b", 2)):
        words = ("sft", *SHORT, f"train.seed={seed}", f"run.dir={home / 'runs' / name}")
        if ended(start(words, home, Path(os.environ["POSTTRAIN_CACHE"])), float("inf"), False):
            sys.exit(f"a run without any kill failed: see {home.with_suffix('.log')}")
    mine = [case for case in cases(home / "runs") if case.name in chosen or not chosen]
    known = [(case, *torture.straight(case)) for case in mine]
    with Nursery() as nursery:
        pair = two_processes(torture, nursery, 0, None) if "processes" in chosen or not chosen else None
        number = 0
        while sum(torture.kills.values()) < options.count and not torture.wrong:
            number += 1
            for case, expected, seconds in known:
                torture.until_it_ends(case, number, expected, seconds)
            if pair is not None:
                two_processes(torture, nursery, number, pair)
    by_name = ", ".join(f"{name} {count}" for name, count in torture.kills.items())
    print(f"seed {options.seed}: {sum(torture.kills.values())} kills ({by_name}) in {time.monotonic() - began:.0f} s")
    print("each ended bit-identical" if not torture.wrong else f"{len(torture.wrong)} ended otherwise: {torture.wrong}")
    if not torture.wrong:
        shutil.rmtree(home)
    return int(bool(torture.wrong))


if __name__ == "__main__":
    sys.exit(main())
