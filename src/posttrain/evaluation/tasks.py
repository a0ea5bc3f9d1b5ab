"""Tasks of EleutherAI's lm-eval on a model that is loaded: which there are, how they are asked, what came out."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from posttrain.config.words import whole_number
from posttrain.errors import UserError, did_you_mean, reading

KEYS = ("tasks", "limit", "shots", "batch_size", "chat_template", "include")
BATCH_SIZE = 8
TRUTH = {"true": True, "false": False}
DOWNLOAD = "a task that is downloaded needs a network once; one that runs code that a model writes is not asked here"


@dataclass(frozen=True)
class Tasks:
    """names: as lm-eval lists them. shots: None for each task's own number of examples. chat_template: None for as the run's rows
    were rendered. limit: questions of each, from the first; None for all. batch_size: of questions that are asked at once.
    include: a directory of the user's own tasks, whose YAML may name Python functions."""

    names: tuple[str, ...]
    limit: int | None = None
    shots: int | None = None
    batch_size: int = BATCH_SIZE
    chat_template: bool | None = None
    include: Path | None = None

    @classmethod
    def of(cls, words: Mapping[str, str]) -> Tasks:
        """words: KEY=VALUE of `KEYS`. Raises UserError."""
        limit, shots, size = (whole_number(words, key, least) for key, least in (("limit", 1), ("shots", 0), ("batch_size", 1)))
        if words.get("chat_template", "true") not in TRUTH:
            raise UserError(f"chat_template: '{words['chat_template']}' is neither true nor false")
        include = Path(words["include"]).expanduser() if "include" in words else None
        names = tuple(name.strip() for name in words["tasks"].split(",") if name.strip())
        if not names:
            raise UserError("tasks: give names of lm-eval's tasks, such as tasks=gsm8k,arc_easy")
        return cls(names, limit, shots, size or BATCH_SIZE, TRUTH.get(words.get("chat_template", "")), include)

    def prepared(self, field: str = "tasks", of_include: str = "include") -> Asking:
        """Their questions, read by lm-eval, with which a model can be asked. field, of_include: what messages call the two.

        Raises UserError where lm-eval is missing, or one of the tasks, or its data cannot be had.
        """
        if self.include and not self.include.is_dir():
            raise UserError(f"{of_include}: {self.include} is no directory of tasks")
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            raise UserError(f"{field}: lm-eval is not installed ({error}); pip install 'posttrain[eval]'") from None
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        with reading(f"{field}: lm-eval cannot list its tasks", f"mend the files in {of_include}={self.include}"):
            listed = TaskManager(include_path=self.include)
        for name in self.names:
            if not listed.match_tasks([name]):
                near = did_you_mean(name, listed.all_tasks)
                raise UserError(f"{field}: lm-eval has no '{name}'{near or '; `lm-eval ls tasks` lists them'}")
        with reading(f"{field}: lm-eval cannot read {', '.join(self.names)}", DOWNLOAD):
            listed.load(list(self.names))
        return Asking(self, listed, field)


@dataclass(frozen=True)
class Asking:
    """Tasks that are there to be asked. listed: lm-eval's TaskManager. field: in messages."""

    tasks: Tasks
    listed: Any
    field: str = "tasks"

    def chat(self, tokenizer: Any, is_chat: bool) -> bool:
        """Are they asked by the chat template? is_chat: where the tasks leave it open. Raises UserError where there is none."""
        chat = is_chat if self.tasks.chat_template is None else self.tasks.chat_template
        if chat and not tokenizer.chat_template:
            raise UserError("chat_template: this model has no chat template; leave chat_template=true out")
        return chat

    def line(self, chat: bool) -> str:
        """How they are asked, in words."""
        tasks = self.tasks
        shots = "each task's own number of examples" if tasks.shots is None else f"{tasks.shots} examples"
        return f"tasks: asked {'by the chat template' if chat else 'as plain text'}, with {shots}, {tasks.batch_size} at a time"

    def measure(self, model: Any, tokenizer: Any, chat: bool) -> dict[str, float]:
        """Figures by task/metric, and by task/filter/metric where a filter picks the answer; a standard error under its metric's
        name with _stderr. The model and the tokenizer stay as they are, but for the model's mode. Raises UserError with what
        lm-eval says."""
        harness: Any = import_module("lm_eval")  # its types say other than it takes
        tasks = self.tasks
        own = copy.deepcopy(tokenizer)  # it is given a padding token
        with reading(f"{self.field}: lm-eval cannot ask {', '.join(tasks.names)}", DOWNLOAD):
            lm = import_module("lm_eval.models.huggingface").HFLM(pretrained=model, tokenizer=own, batch_size=tasks.batch_size)
            found: Any = harness.simple_evaluate(
                model=lm, tasks=list(tasks.names), num_fewshot=tasks.shots, limit=tasks.limit, apply_chat_template=chat,
                task_manager=self.listed, log_samples=False, bootstrap_iters=1000,
            )  # fmt: skip
        return {
            _name(task, metric): float(value)
            for task, metrics in (found or {"results": {}})["results"].items()  # nothing but in rank 0
            for metric, value in metrics.items()
            if isinstance(value, int | float) and "," in metric
        }


def _name(task: str, metric: str) -> str:
    """metric: as lm-eval has it, "exact_match_stderr,strict-match"."""
    figure, _, picked = metric.partition(",")
    return "/".join([task, figure] if picked == "none" else [task, picked, figure])
