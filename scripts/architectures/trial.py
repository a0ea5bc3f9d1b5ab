"""One architecture in every stage and method: what ran, what was refused and in which words, and what came out wrong."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from architectures import checks
from architectures.rows import EPSILON, LR, ROWS, STEPS, sees_later, write_rows
from architectures.tiny import Architecture, NotTiny
from posttrain.commands.merge import merge_run
from posttrain.commands.plan.plan import make_plan
from posttrain.config.compose import compose, inherit_model, validate
from posttrain.launch.exit_codes import guarded
from posttrain.launch.worker import run_config

CELLS = ("full", "lora", "experts", "qlora", "dpo", "rm", "ppo", "merge", "reload", "plan")


@dataclass
class Cell:
    """state: ok | refused (exit code 2) | failed (another code, or an exception) | wrong (it ran, and a figure is not what plain
    transformers gives) | none (there is nothing of the kind). said: the line, or the figures."""

    state: str
    said: str = ""


@dataclass
class Record:
    """What is written down of one architecture. made: why not, or ''. reading: as the manifest has it, packed | joined | rows |
    alone; '' where it is refused. why: what kept it from the faster ways."""

    name: str
    class_name: str
    mapping: str
    made: str = ""
    causal: bool = True
    reading: str = ""
    why: str = ""
    cells: dict[str, Cell] = field(default_factory=dict[str, Cell])
    seconds: float = 0.0


@dataclass(frozen=True)
class Ran:
    """A command's end: its exit code, all that it said, and what it returned."""

    directory: Path
    code: int
    said: str
    result: Any = None

    @property
    def cell(self) -> Cell:
        """What to write down where nothing of the result is looked at."""
        if self.code == 0:
            return Cell("ok")
        lines = [line for line in self.said.splitlines() if line.strip()]
        last = lines[-1] if lines else "no message"
        return Cell("refused" if self.code == 2 else "failed", last.removeprefix("error: ").removeprefix("failed: "))

    @property
    def metrics(self) -> list[dict[str, float]]:
        """The lines of metrics.jsonl."""
        return [json.loads(line) for line in (self.directory / "metrics.jsonl").read_text().splitlines()]


class Trial:
    """folder: an empty one, which is taken away afterwards by who gave it."""

    def __init__(self, architecture: Architecture, folder: Path) -> None:
        self.folder = folder
        self.record = Record(architecture.name, architecture.class_name, architecture.mapping)
        self.ran: dict[str, Ran] = {}
        self.architecture = architecture

    def run(self) -> Record:
        """Everything, in turn. Never raises."""
        began = time.monotonic()
        try:
            model = self.architecture.make(self.folder / "base")
            self.record.causal = not model.config.is_encoder_decoder and not sees_later(model)
        except NotTiny as reason:
            self.record.made = str(reason)
            return self.record
        checks.without_dropout(self.folder / "base", self.folder / "still")
        write_rows(self.folder)
        self._train()
        self._look()
        self._reading()
        self.record.seconds = round(time.monotonic() - began, 1)
        return self.record

    def _train(self) -> None:
        """The runs, each from the one before where that has left something."""
        base = f"model.name={self.folder / 'base'}"
        still = f"model.name={self.folder / 'still'}"
        fixed = [f"optim.lr={LR}", f"optim.eps={EPSILON}", "optim.schedule=constant", "optim.warmup_ratio=0"]
        self._stage("full", "sft", still, *fixed)
        self._stage("lora", "sft", base, "+peft=lora", "optim.lr=0.003", "train.gradient_checkpointing=auto")
        self._stage("qlora", "sft", base, "+peft=qlora", "quant.compute_dtype=float32", "optim.lr=0.003")
        start = f"init={self.folder / 'lora'}" if self.ran["lora"].code == 0 else base
        self._stage("dpo", "dpo", start, "+peft=lora")
        self._stage("rm", "rm", start, "+peft=lora")
        reward = ["rollout.max_new_tokens=4", "train.batch_size=2", "train.grad_accum=4", "train.max_steps=1", "ppo.epochs=1"]
        if self.ran["rm"].code == 0:
            reward.append(f"init_reward={self.folder / 'rm'}")
        else:
            reward.append("reward.function=architectures.checks:length")
        self._stage("ppo", "ppo", start, "+peft=lora", *reward)
        if self.ran["lora"].code == 0:
            self._command("merge", lambda: merge_run(self.folder / "lora", self.folder / "merge", 0.05, "auto"))

        if self.ran["qlora"].code == 0:
            self._command(
                "dequantized", lambda: merge_run(self.folder / "qlora", self.folder / "dequantized", 0.5, "dequantized")
            )
        words = self._words("plan", "sft", (base, "+peft=lora"))
        self._command("plan", lambda: make_plan("sft", list(words)))

    def _stage(self, name: str, stage: str, *words: str) -> None:
        self._command(name, lambda: _run(stage, self._words(name, stage, words)))

    def _words(self, name: str, stage: str, words: tuple[str, ...]) -> tuple[str, ...]:
        data = self.folder / ("pairs.jsonl" if stage in ("dpo", "rm") else "rows.jsonl")
        common = [
            f"data.path={data}", f"data.eval_path={data}", f"data.eval_rows={ROWS}", "data.max_untrained_share=1",
            f"train.max_steps={STEPS}", "train.batch_size=4", "train.grad_accum=2", "train.max_length=128",
            "train.gradient_checkpointing=false", "eval.sets=null", "model.dtype=float32", f"run.dir={self.folder / name}",
        ]  # fmt: skip
        given = {word.partition("=")[0] for word in words}
        return (*(word for word in common if word.partition("=")[0] not in given), *words)

    def _command(self, name: str, command: Callable[[], Any]) -> None:
        said, results = io.StringIO(), list[Any]()
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            code = guarded(lambda: results.append(command()))
        text = said.getvalue()
        for directory in ("base", "still"):  # the same line for both, on every machine
            text = text.replace(str(self.folder / directory), "MODEL")
        self.ran[name] = Ran(self.folder / name, code, text, *results)

    def _reading(self) -> None:
        done = next((ran.result for ran in self.ran.values() if ran.code == 0 and ran.result and "reading" in ran.result), None)
        if done:
            self.record.reading, self.record.why = done["reading"]["way"], done["reading"]["why"]

    def _look(self) -> None:
        """Each result against plain transformers and peft."""
        cells = self.record.cells = {name: ran.cell for name, ran in self.ran.items() if name in CELLS}
        for name in CELLS:
            cells.setdefault(name, Cell("none"))
        cells["plan"] = checks.plan(self)
        if not self.record.causal:
            return
        looks: dict[str, Callable[[Trial], str]] = {
            "full": checks.full, "lora": checks.lora, "qlora": checks.qlora, "dpo": checks.dpo, "rm": checks.rm,
            "ppo": checks.ppo, "merge": checks.merge,
        }  # fmt: skip
        for name, look in looks.items():
            if cells[name].state == "ok":
                cells[name] = _judged(look, self)
        if self.ran["lora"].code == 0 and self.ran["full"].code == 0:
            cells["reload"] = _judged(checks.reload, self)
        cells["experts"] = checks.experts(self)


def _judged(look: Callable[[Trial], str], trial: Trial) -> Cell:
    try:
        trouble = look(trial)
    except Exception as error:
        return Cell("wrong", f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"[:300])
    return Cell("wrong", trouble) if trouble else Cell("ok")


@cache
def _composed(stage: str, words: tuple[str, ...]) -> dict[str, Any]:
    """Half of a tiny run's time; every architecture has the same folder, so the words are the same."""
    return compose(stage, list(words))


def _run(stage: str, words: tuple[str, ...]) -> dict[str, Any]:
    """As posttrain.run does it."""
    config = inherit_model(deepcopy(_composed(stage, words)), list(words))
    validate(config)
    return run_config(config)


def cleared(folder: Path) -> Path:
    """An empty folder there."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder
