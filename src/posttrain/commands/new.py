"""`posttrain new`: a few questions, and a commented YAML of the answers that `--config` takes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import reduce
from pathlib import Path
from typing import Any

from posttrain.config.choices import is_reward_function
from posttrain.config.compose import compose_run
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.runs.files import write_text
from posttrain.stages.spec import StageSpec, spec_of

Ask = Callable[[str, str], str]  # a question and its default -> the answer


@dataclass(frozen=True)
class Question:
    """key: of the setting that its answer is; default: '' where there is none, and the shipped default stays."""

    key: str
    text: str
    default: str = ""
    is_needed: bool = False


MODEL = Question("model", "Which model? smollm2, tiny, qwen3, llama3, ..., ORG/NAME or a directory", "smollm2")
DATA = Question("data.path", "Which data? a file (JSONL, JSON, CSV, Parquet, text) or a hub id; empty: the rows that come along")
REWARD = Question("reward", "What gives the reward? a rm run's directory, or exact, numeric, length, ...", "length")
METHOD = Question("peft", "What is trained? lora, qlora (on a base in 4 bits), full, dora, ...", "lora")
MEMORY = Question("memory", "How much memory has the device? such as 24GB; auto: this machine's, skip: do not look", "auto")
REWARDS = {"init_reward", "reward.function"}
PICTURES = (
    Question("data.instance_dir", "In which folder are the pictures?", is_needed=True),
    Question(
        "data.instance_prompt", "What do they show, with a rare word for the individual? such as: a sks dog", is_needed=True
    ),
    Question("data.class_prompt", "The same without that word, such as: a dog", is_needed=True),
)
# what one changes next, in this order, and why
NEXT = (
    ("init", "a finished run to go on from"),
    ("train.epochs", "passes over the data; train.max_steps: 100 wins over it"),
    ("train.max_steps", "optimizer steps"),
    ("train.batch_size", "rows in a micro-batch: what memory is needed for"),
    ("train.grad_accum", "micro-batches in an optimizer step"),
    ("train.max_length", "tokens; longer rows are cut"),
    ("optim.lr", "the learning rate; auto: by a rule"),
    ("train.eval_steps", "held-out figures every so many steps"),
    ("train.keep_best", "such as eval/loss: the result is the best checkpoint"),
    ("train.save_steps", "a checkpoint every so many steps"),
    ("train.seed", "of everything random"),
)


def new_config(stage: str, given: Mapping[str, str | None], words: list[str], to: Path, ask: Ask | None) -> Path:
    """Write `to`, a file of settings for `posttrain STAGE --config`; returns it.

    given: answers by the keys of questions, None where there is none yet. words: further settings, KEY=VALUE. ask: None takes
    the defaults. Raises UserError for what the stage itself would refuse, and for a `to` that is there already.
    """
    spec = spec_of(stage)
    if to.exists():
        raise UserError(f"--to: {to} is there already; name another file")
    told = {word.lstrip("+").partition("=")[0] for word in words}
    asked = [each for each in questions(spec) if each.key not in told and not (each is REWARD and told & REWARDS)]
    answers = {each.key: _answer(each, given.get(each.key), ask) for each in asked}
    memory = answers.pop(MEMORY.key)
    settings = _settings(spec, answers) + words
    config = compose_run(stage, settings)
    changes = _that_fit(stage, settings, memory)
    if changes:
        config = compose_run(stage, [*settings, *changes])
    write_text(to, _text(spec, to, settings, changes, config))
    say(f"wrote {to}; next: posttrain preview {stage} --config {to}, and posttrain {stage} --config {to}")
    return to


def question_on_terminal() -> Ask:
    """Asks whoever sits there. Raises UserError where nobody does."""
    import typer

    if not sys.stdin.isatty():
        raise UserError("new: there is no terminal to ask on; give the answers as options, and --yes")
    return lambda text, default: typer.prompt(text, default=default, show_default=bool(default))


def questions(spec: StageSpec) -> tuple[Question, ...]:
    """What is asked of a stage."""
    if spec.reads == "images":
        return (Question(MODEL.key, "Which model? sd15, sdxl, sd3, flux, tiny, or ORG/NAME", "sd15"), *PICTURES, METHOD, MEMORY)
    scored = any(parent.role == "reward" for parent in spec.parents)
    return (MODEL, DATA, *((REWARD,) if scored else ()), METHOD, MEMORY)


def _answer(question: Question, given: str | None, ask: Ask | None) -> str:
    if given is None and ask:
        given = ask(question.text, question.default).strip()
    found = given or question.default
    if question.is_needed and not found:
        raise UserError(f"{question.key}: it has no default; give {question.key}=...")
    return found


def _settings(spec: StageSpec, answers: dict[str, str]) -> list[str]:
    """Answers as words of the command line."""
    found = []
    for key, value in answers.items():
        if key == MODEL.key and ("/" in value or value.startswith((".", "~"))):
            key = "model.name"
        elif key == REWARD.key:
            key = "reward.function" if is_reward_function(value) else "init_reward"
        if value:
            found.append(f"{key}={value}")
    return found


def _that_fit(stage: str, settings: list[str], memory: str) -> list[str]:
    """Further settings, where the run would need more memory than there is. What cannot be planned is said."""
    from posttrain.commands.plan.plan import make_plan, parse_memory

    if memory == "skip":
        return []
    try:
        plan = make_plan(stage, settings, None if memory == "auto" else parse_memory(memory))
    except UserError as error:
        if not str(error).startswith("model"):  # which may be had where the run will be
            raise
        say(f"memory was not looked at ({error}); later: posttrain plan {stage} --config FILE")
        return []
    size = plan["total_bytes"] / 2**30
    if plan["fits"]:
        say(f"needs about {size:.2f} GiB, which fits")
        return []
    fitting = next((change for change in plan["changes"] if change["fits"]), None)
    if fitting is None:
        say(f"needs about {size:.2f} GiB, which does not fit, and no change that is known makes it fit; take a smaller model")
        return []
    say(f"needs about {size:.2f} GiB, which does not fit: taken over {fitting['override']}")
    return fitting["override"].split()


def _text(spec: StageSpec, to: Path, settings: list[str], changes: list[str], config: dict[str, Any]) -> str:
    """The file: the answers, what makes them fit, and what one changes next, as comments where it is the default."""
    said = {word.lstrip("+").partition("=")[0]: word.partition("=")[2] for word in [*settings, *changes]}
    lines = [
        f"# {spec.about}",
        f"#   posttrain preview {spec.name} --config {to}    what the model will see",
        f"#   posttrain {spec.name} --config {to}            run it; words behind it win over this file",
        "# All keys: docs/configuration.md, or: posttrain " + f"{spec.name} --config {to} --cfg job",
        "",
    ]
    fitted = {word.lstrip("+").partition("=")[0] for word in changes}
    lines += [_line(key, value, "so that it fits in memory" if key in fitted else "") for key, value in said.items()]
    lines += ["", "# What one changes next; these are the defaults."]
    for key, meaning in NEXT:
        value = reduce(lambda tree, name: tree.get(name, _NONE) if isinstance(tree, dict) else _NONE, key.split("."), config)
        if key not in said and value is not _NONE:
            lines.append("# " + _line(key, _plain(value), meaning))
    return "\n".join(lines) + "\n"


_NONE: Any = object()


def _line(key: str, value: str, meaning: str) -> str:
    return f"{key}: {_quoted(value)}".ljust(40) + f"  # {meaning}" if meaning else f"{key}: {_quoted(value)}"


def _quoted(value: str) -> str:
    """As YAML; quoted where a plain text would be read as something else."""
    is_plain = not value.startswith(("[", "{")) and any(each in value for each in ":#'\"%@&*!|>,{}[]`")
    return json.dumps(value, ensure_ascii=False) if is_plain or value != value.strip() else value


def _plain(value: Any) -> str:
    return f"{value:.10g}" if isinstance(value, float) else "null" if value is None else str(value)
