"""What a stage is, in one place: command line, configs, recipes, preview, plan, evaluation and docs read it. No torch.

A stage is a folder under stages/ (or a package of others, by an entry point of the group "posttrain.stages") with a `SPEC`, and a
YAML of its name under configs/.
"""

from __future__ import annotations

import importlib
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.paths import root
from posttrain.config.stages import REGISTRY
from posttrain.data.row_use import RowUse
from posttrain.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from posttrain.config.schema import Stage
    from posttrain.stages.stage import Steps


@dataclass(frozen=True)
class Parent:
    """A config key that can name a finished run, and the role of that run in the manifest's `parents`."""

    key: str
    role: str


INIT = Parent("init", "init")


@dataclass(frozen=True)
class StageSpec:
    """What all tools need to know of a stage before anything is loaded.

    Args:
        name: the command's, the YAML's and the folder's.
        position: where it stands in lists.
        about: one line of help.
        examples: words behind `posttrain NAME +peft=...` that work: with data of one's own, and one more.
        settings: (key, meaning) of the settings that help names.
        config: "module:Class" of its pydantic model.
        steps: "module:function", config -> `Steps`.
        rows: what it makes of rows of text; None: it reads none.
        rows_by: "module:function", config -> what it makes of them where that depends on the config; None: it does not.
        parents: the config keys that can name a finished run, `init` first.
        files: config keys that name files or folders whose content decides the result.
        reads: "text" or "images": a stage goes on from a run of its own kind alone.
        measured_by: "module:function", config -> the objective by which `eval` measures its own held-out rows; None: as sets of
            `eval.sets` are.
        says: "module:function", config -> lines that a run and its preview say before they begin; None: it has none of its own.
        figures: of its held-out evaluation, without `eval/`, those of some configs alone among them; NAME_* stands for its parts.
            None: they are known when they are measured.
        plan: module with what `plan` must know of this stage alone (stages/language/plan.py says what).
    """

    name: str
    position: int
    about: str
    examples: tuple[str, str]
    settings: tuple[tuple[str, str], ...]
    config: str
    steps: str
    rows: RowUse | None
    rows_by: str | None = None
    parents: tuple[Parent, ...] = (INIT,)
    files: tuple[str, ...] = ("data.path", "data.eval_path", "model.chat_template")
    reads: Literal["text", "images"] = "text"
    measured_by: str | None = None
    says: str | None = None
    figures: tuple[str, ...] | None = None
    plan: str = "posttrain.stages.language.plan"

    @property
    def config_class(self) -> type[Stage]:
        """The pydantic model of its config."""
        return _load(self.config)

    def plan_of(self) -> Any:
        """The module that says what a plan must know of the stage. Imports torch."""
        return importlib.import_module(self.plan)

    def rows_of(self, cfg: Any) -> RowUse:
        """What it makes of rows under this config."""
        assert self.rows, "a stage of language models reads rows"
        return _load(self.rows_by)(cfg) if self.rows_by else self.rows

    def lines_of(self, cfg: Any) -> list[str]:
        """The stage's own lines among the first of a run. Imports torch. Raises UserError for a config that does not fit."""
        return _load(self.says)(cfg) if self.says else []

    def objective_of(self, cfg: Any) -> Any:
        """The objective by which `eval` measures the stage's own held-out rows. Imports torch."""
        assert self.measured_by
        return _load(self.measured_by)(cfg)

    def steps_of(self, cfg: Any) -> Steps[Any, Any, Any]:
        """The stage's own part of a run of this config. Imports torch."""
        return _load(self.steps)(cfg)


# what help names of every stage of language models, and of every stage
OF_LANGUAGE = (
    ("model=smollm2", "or tiny, llama3, qwen3, ...; model.name=ORG/NAME or a directory"),
    ("init=null", "a finished run to go on from, a hub id or a path"),
    ("+peft=qlora", "or lora; without it every weight is trained. peft.r, peft.alpha, peft.targets"),
    ("quant=none", "or nf4 (qlora chooses it)"),
    ("data.path=FILE", "JSONL, JSON, CSV, Parquet, text, or a hub id; data.split, data.max_rows"),
    ("train.epochs=1", "or train.max_steps; train.batch_size, train.grad_accum, train.max_length"),
)
OF_ALL = (
    ("optim.lr=RATE", "also optim=paged_adamw_8bit, optim.schedule, optim.warmup_ratio"),  # help puts the stage's own in
    ("train.seed=42", "also train.save_steps, train.eval_steps, train.keep_best, train.early_stopping.patience, train.processes"),
    ("run.dir=DIR", "default runs/STAGE/TIME-ID; the same command goes on where it stopped"),
)


def usual_rates(stage: str) -> tuple[float, float] | None:
    """The learning rates (with LoRA, in full) of the stage's shipped YAML, read without Hydra; None where it has none."""
    file = root("configs") / f"{stage}.yaml"
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    found = {name: float(value) for name, value in re.findall(r"^(full_lr|lora_lr): *([\d.e-]+)", text, re.MULTILINE)}
    return (found.get("lora_lr", 10 * found["full_lr"]), found["full_lr"]) if "full_lr" in found else None  # 10: of peft=lora


def stages() -> dict[str, StageSpec]:
    """All of them, by name, in their order."""
    return dict(sorted(REGISTRY.all().items(), key=lambda item: (item[1].position, item[0])))


def spec_of(name: str) -> StageSpec:
    """Raises UserError, with a near name, where there is no such stage."""
    known = list(stages())
    if name not in known:
        raise UserError(f"there is no stage '{name}'{did_you_mean(name, known)} (there are: {', '.join(known)})")
    return REGISTRY.get(name)


def _load(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def row_uses() -> dict[str, RowUse]:
    """By stage, for those that read rows of text."""
    return {name: spec.rows for name, spec in stages().items() if spec.rows}
