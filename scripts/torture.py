"""Kills that no run may notice: `make torture`, or `python scripts/torture.py --count 200 --seed 0 [--stages sft,ppo]`.

Every stage runs straight through, with model=tiny. Then a run of it is killed with SIGKILL at random moments, a good part of
them within a save, and started again with the same config, until it ends by itself; what it leaves must be the straight run's,
bit for bit: weights, optimizer, the order of the data and the logged figures. Runs are forked from one process that has torch in
memory already, so a kill costs a second or two.
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
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a pool of threads does not outlive a fork
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

STEPS = 10
COMMON = ("model=tiny", f"train.max_steps={STEPS}", "train.batch_size=2", "train.save_steps=2", "train.eval_steps=3")
LANGUAGE = ("data.max_rows=40", "eval.rows=1", "data.eval_rows=2", "train.max_length=256")
PPO = ("rollout.max_new_tokens=8", "reward.function=posttrain.rewards:brevity", "train.grad_accum=2", "ppo.minibatches=2")
STAGES: dict[str, list[tuple[str, ...]]] = {
    "cpt": [LANGUAGE, (*LANGUAGE, "+peft=adalora", "peft.r=2", "peft.init_r=4")],
    "sft": [(*LANGUAGE, "+peft=lora", "peft.dropout=0.1"), (*LANGUAGE, "+peft=prefix")],
    "rm": [(*LANGUAGE, "+peft=lora", "peft.dropout=0.1")],
    "ppo": [(*LANGUAGE, *PPO, "+peft=lora", "ppo.advantage=grpo", "ppo.samples=2"), (*LANGUAGE, *PPO, "+peft=lora")],
    "dpo": [(*LANGUAGE, "+peft=lora", "peft.dropout=0.1"), LANGUAGE],
    "dreambooth": [
        ("+peft=lora", "data.instance_prompt=a sks dog", "data.class_prompt=a dog", "prior.images=2", "prior.inference_steps=2",
         "sample.inference_steps=2", "sample.images=1", "sample.unrelated=[]", "eval.images=1", "eval.levels=2"),
    ],
}  # fmt: skip
SAVE_CALLS = 14  # places within one save at which a kill can strike
END = 250  # no exit code of the tool


def photographs(folder: Path) -> Path:
    import numpy as np
    from PIL import Image

    folder.mkdir(exist_ok=True)
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 255, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    return folder


def composed(home: Path, stage: str, words: tuple[str, ...]) -> dict[str, Any]:
    from posttrain.config.compose import compose_run

    own = [f"data.instance_dir={photographs(home / 'photographs')}"] if stage == "dreambooth" else []
    return compose_run(stage, [*COMMON, *words, *own])


def fork(config: dict[str, Any], run: Path, before: Callable[[], None]) -> int:
    """A process that runs `config` in `run` after `before`; its id."""
    child = os.fork()
    if child:
        return child
    code = END
    try:
        target = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(target, 1)
        os.dup2(target, 2)
        before()
        from posttrain.launch.exit_codes import guarded
        from posttrain.launch.worker import run_config

        code = guarded(lambda: run_config({**config, "run": config["run"] | {"dir": str(run)}}))
        sys.stdout.flush()
    finally:
        os._exit(code)


def ended(child: int, kill_after: float | None) -> tuple[bool, int]:
    """Was it killed, and else its exit code. kill_after: seconds."""
    deadline = time.monotonic() + kill_after if kill_after is not None else float("inf")
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
            return killed, os.waitstatus_to_exitcode(status)
        if time.monotonic() >= deadline:
            os.kill(child, signal.SIGKILL)
            deadline = float("inf")
        time.sleep(0.002)


def dies_within_a_save(rng: random.Random) -> Callable[[], None]:
    """Let this process kill itself at one of the next calls with which a checkpoint is written, some of them half done."""
    left, half = rng.randrange(1, SAVE_CALLS * STEPS // 2), rng.random()

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def counted(function: Callable[..., Any], halfway: Callable[..., None]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            nonlocal left
            left -= 1
            if left == 0:
                halfway(*args)
                die()
            return function(*args, **options)

        return call

    def arm() -> None:
        import posttrain.training.checkpoint as checkpoint

        save, remove = checkpoint.save_file, shutil.rmtree

        def half_a_file(tensors: Any, path: Path) -> None:
            save(tensors, path)
            os.truncate(path, int(half * path.stat().st_size))

        def half_a_directory(path: Path, **_: Any) -> None:
            for each in sorted(path.glob("*"))[: int(3 * half)]:
                each.unlink()

        checkpoint.save_file = counted(save, half_a_file)
        checkpoint.flush = counted(checkpoint.flush, lambda path: None)
        checkpoint.sha256 = counted(checkpoint.sha256, lambda path: None)
        checkpoint.shutil = SimpleNamespace(rmtree=counted(remove, half_a_directory))  # type: ignore[assignment]
        checkpoint.os = SimpleNamespace(getpid=os.getpid, rename=counted(os.rename, lambda a, b: None))  # type: ignore[assignment]

    return arm


def outcome(run: Path) -> dict[str, Any]:
    """Everything of a finished run that must not depend on how often it was killed."""
    from posttrain.runs.files import sha256

    manifest = json.loads((run / "manifest.json").read_text())
    last = run / "checkpoints" / f"step-{STEPS:06d}"
    files = [p for p in sorted((run / manifest["weights"]["path"]).rglob("*.safetensors")) if p.is_file()]
    files += sorted(last.glob("*.safetensors"))
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    figures = [{k: v for k, v in line.items() if not k.endswith("per_second")} for line in lines]
    found: dict[str, Any] = {str(p.relative_to(run)): sha256(p) for p in files}
    return found | {"drawn": json.loads((last / "checkpoint.json").read_text())["state"]["drawn"], "metrics": figures}


class Torture:
    def __init__(self, home: Path, seed: int) -> None:
        self.home, self.rng = home, random.Random(seed)
        self.kills, self.in_saves, self.runs, self.wrong = 0, 0, 0, list[str]()

    def straight(self, config: dict[str, Any]) -> tuple[dict[str, Any], float]:
        """What an undisturbed run leaves, and how long it took when all caches were warm."""
        stage, found, seconds = config["stage"], dict[str, Any](), 0.0
        for again in ("first", "second"):
            run = self.home / f"{stage}-{self.runs}-{again}"
            began = time.monotonic()
            _, code = ended(fork(config, run, lambda: None), None)
            seconds = time.monotonic() - began
            if code:
                sys.exit(f"{stage} failed without any kill (exit {code}): see {run.with_suffix('.log')}")
            if found and outcome(run) != found:
                sys.exit(f"{stage}: two undisturbed runs differ")
            found = outcome(run)
            shutil.rmtree(run)
        return found, seconds

    def run_to_the_end(self, config: dict[str, Any], expected: dict[str, Any], seconds: float, limit: int) -> None:
        """Kill a run until it ends by itself, at most `limit` times; then compare."""
        self.runs += 1
        stage = config["stage"]
        run = self.home / f"{stage}-{self.runs:03d}"
        killed, kills, within, code = True, 0, 0, 0
        while killed:
            spared = kills >= limit or self.rng.random() < 0.15
            save = not spared and self.rng.random() < 0.5
            before = dies_within_a_save(self.rng) if save else lambda: None
            after = None if spared or save else self.rng.random() * 1.1 * seconds
            killed, code = ended(fork(config, run, before), after)
            kills, within = kills + killed, within + (killed and save)
        self.kills, self.in_saves = self.kills + kills, self.in_saves + within
        same = code == 0 and outcome(run) == expected
        print(
            f"{stage:<11}{kills} kills, {within} of them within a save: {'the same' if same else f'WRONG, see {run}'}", flush=True
        )
        if same:
            shutil.rmtree(run)
        else:
            self.wrong.append(str(run))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--count", type=int, default=200, help="kills, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--stages", default=",".join(STAGES))
    options = parser.parse_args()
    home = Path(tempfile.mkdtemp(prefix="posttrain-torture-"))
    os.environ.setdefault("POSTTRAIN_CACHE", str(home / "cache"))
    stages, began = options.stages.split(","), time.monotonic()
    warm_up(stages)
    torture = Torture(home, options.seed)
    configs = [composed(home, stage, words) for stage in stages for words in STAGES[stage]]
    known = [(config, *torture.straight(config)) for config in configs]
    while torture.kills < options.count and not torture.wrong:
        for case in known:
            if torture.kills < options.count:
                torture.run_to_the_end(*case, limit=min(8, options.count - torture.kills))
    kills = f"{torture.kills} kills, {torture.in_saves} of them within a save"
    print(f"seed {options.seed}: {kills}, over {torture.runs} runs of {len(stages)} stages in {time.monotonic() - began:.0f} s")
    print("each ended bit-identical" if not torture.wrong else f"{len(torture.wrong)} ended otherwise: {torture.wrong}")
    if not torture.wrong:
        shutil.rmtree(home)
    return int(bool(torture.wrong))


def warm_up(stages: list[str]) -> None:
    """Have in memory what every run would import."""
    import importlib

    import peft  # noqa: F401
    import torch

    torch.set_num_threads(1)
    for stage in stages:
        importlib.import_module(f"posttrain.stages.{stage}")


if __name__ == "__main__":
    sys.exit(main())
