"""`posttrain eval`: what a finished run's result, or a bare model, makes of held-out rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from rich.table import Table

from posttrain.commands.win_rates import KEYS as OF_ANSWERS
from posttrain.commands.win_rates import ROWS, answer_metrics
from posttrain.commands.words import runs_and_settings
from posttrain.config.compose import validate
from posttrain.config.schema import LanguageStage
from posttrain.config.stages import typed_config
from posttrain.config.stored import completed
from posttrain.config.words import whole_number
from posttrain.console import console, say
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import weighing_of
from posttrain.data.prepare import held_out_of, prepare, prepare_set
from posttrain.errors import UserError
from posttrain.evaluation.calibration import wilson
from posttrain.evaluation.held_out import EvalSet, own_metrics, pack_by_tokens, set_metrics
from posttrain.evaluation.paired import Rows, change_bounds
from posttrain.evaluation.tasks import KEYS as OF_TASKS
from posttrain.evaluation.tasks import Tasks
from posttrain.models.hub import resolve
from posttrain.models.language.loading import LoadedModel, device_here, load_in_turn, load_model, of_language, scorer, switch
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.run_data import data_of, of_file
from posttrain.runs.artifact import Artifact
from posttrain.runs.cache_place import cache_root
from posttrain.stages.language.prepare import eval_sets, rows_of
from posttrain.stages.language.summary import lines_of_source
from posttrain.stages.rm.policy_pairs import PAIRS, data_of_pairs
from posttrain.stages.spec import spec_of

KEYS = ("rows", "max_length", *dict.fromkeys((*OF_TASKS, *OF_ANSWERS)))
MAX_LENGTH = 1024  # tokens of a row, unless a word says otherwise
WAYS = {"tasks": OF_TASKS, "reward.function": OF_ANSWERS}  # what asks for another kind of evaluation, and its settings
ABOUT = {"tasks": "lm-eval's tasks", "reward.function": "scored answers"}


def evaluate_runs(words: list[str]) -> dict[str, dict[str, float]]:
    """Figures of every run (or model) among `words`; the other words are KEY=VALUE settings. Rows are read and rendered as
    the run had `data`, unless a word says otherwise (data.template=none).

    data.path=FILE: text gives loss and perplexity, conversations the loss of the responses, pairs the share of preferences that
    the model has by its own likelihood a token, with a 95 % interval. Without it: what the first run holds out, for all. Beside
    the first result a loss has the 95 % interval of its difference from that one's, as loss_change_low and _high. tasks=A,B:
    tasks of lm-eval (`evaluation.tasks`). reward.function=NAME: what their answers to the prompts at data.path are worth
    (`commands.win_rates`). Raises UserError before a model is loaded.
    """
    runs, settings, of_data = _sorted(words)
    if "reward.function" in settings:
        return answer_metrics(runs, settings, of_data)
    given = [of_language(run) for run in runs]
    for bare in (each for each in given if each.kind == "model" and not each.is_run):
        resolve(bare.source, None, weights=False, field=bare.field)
    if len(runs) == 1 and given[0].reward_head:
        return {Path(runs[0]).name: _scored(runs[0], settings, of_data)}
    asked = Tasks.of(settings).prepared() if "tasks" in settings else None
    first = next((each for each in given if each.config), None)  # what is measured on its rows, all models are
    data_of(first or given[0], of_data)  # a word that does not fit is told first
    if not asked and "data.path" not in of_data:
        if first is None:
            raise UserError("data.path: a bare model holds nothing out; give data.path=FILE, or a run beside it")
        if len(runs) > 1:
            say(f"rows: those that {first.name} has held out, for all")
    found, read_by, by_row = dict[str, dict[str, float]](), set[str](), dict[str, Rows]()
    for loaded, names in load_in_turn(runs, device_here(), of_data):
        live = replace(loaded, beside=first)
        sets = [] if asked else _sets(live, settings, first)
        chat = bool(asked and asked.chat(live.tokenizer, live.is_chat))
        if asked:
            say(asked.line(chat))
        read_by.add(live.encoder.identity)
        for name in names:
            switch(live, names, name)
            if asked:
                found[name] = asked.measure(live.model, live.tokenizer, chat)
            else:
                found[name], by_row[name] = _measured(live, sets)
        del live, loaded  # before the next one is loaded
    if len(read_by) > 1 and not asked:
        say("the models read the rows as different tokens, so losses and perplexities, which are of a token, cannot be compared")
    for name in list(by_row)[1:]:
        found[name] |= change_bounds(by_row[next(iter(by_row))], by_row[name])
    return found


def _measured(live: LoadedModel, sets: list[EvalSet]) -> tuple[dict[str, float], Rows]:
    lm = PackedLM(live.model, kernels=live.kernels)
    metrics, rows = set_metrics(lm, sets, None, cache_root(), torch.device(live.model.device), lambda: None)
    return metrics | _intervals(sets, metrics), rows


def _sorted(words: list[str]) -> tuple[list[str], dict[str, str], dict[str, str]]:
    """Runs, settings, and what is said in place of the run's own `data`."""
    runs, settings, of_data = runs_and_settings(words, KEYS)
    if not runs:
        raise UserError("give a run directory, or a model: posttrain eval RUN data.path=FILE")
    asked = [way for way in WAYS if way in settings]
    if len(asked) > 1:
        raise UserError("tasks: lm-eval's tasks and scored answers are two evaluations; leave out tasks or reward.function")
    for key in settings:
        ways = [way for way, keys in WAYS.items() if ".".join(key.split(".")[:2]) in keys]
        if ways and not set(ways) & set(asked):
            raise UserError(f"{key}: is about {ABOUT[ways[0]]}; give {ways[0]}=NAME,NAME too")
    if "max_length" in settings and "reward.function" in settings:
        raise UserError("max_length: is about held-out rows; with reward.function say max_new_tokens, of an answer")
    _size(settings)
    return runs, settings, of_data


def _sets(live: LoadedModel, settings: dict[str, str], first: Artifact | None) -> list[EvalSet]:
    if "data.path" in live.words:
        rows, length = _size(settings)
        data = of_file(live.data, live.data.path or "", rows)
        found = prepare_set(data, rows, live.encoder, length, data.on_error == "skip")
        for line in lines_of_source(found.stats, length):
            say(line)
        return [EvalSet("data", found.examples, found.kind)]
    assert first and first.config
    cfg = validate(completed(first.config)).model_copy(update={"data": data_of(first, live.words)})
    encoder = live.encoder.weighing_as(weighing_of(cfg))
    return [*_own_set(cfg, encoder), *eval_sets(cfg, cfg.data, encoder)]


def _size(settings: dict[str, str]) -> tuple[int, int]:
    """Rows, and tokens of each, at most. Raises UserError."""
    rows, length = (whole_number(settings, key) for key in ("rows", "max_length"))
    return ROWS if rows is None else rows, MAX_LENGTH if length is None else length


# examples of a stage -> kind of a set
MEASURED_AS = {"documents": "text", "conversations": "conversation", "pairs": "pairs", "labelled": "labelled"}


def _own_set(cfg: LanguageStage, encoder: Encoder) -> list[EvalSet]:
    """What the run held out itself, where a likelihood says something about it: not of prompts, which have no known answer."""
    use = rows_of(cfg)
    kind = MEASURED_AS.get(use.examples)
    if kind is None:
        say(f"{cfg.stage}: its own held-out rows are not measured by likelihood; eval.sets are, or give data.path=FILE")
        return []
    own = held_out_of(cfg.data, use, encoder, cfg.example_length, cache_root())
    return [EvalSet("eval", own, kind)] if len(own) else []


def _scored(run: str, settings: dict[str, str], of_data: dict[str, str]) -> dict[str, float]:
    """A reward model's figures on the pairs at data.path, or on those that its run has held out."""
    if "tasks" in settings:
        raise UserError(f"tasks: {run} is a reward model, which writes nothing")
    live = load_model(run, device_here(), words=of_data)
    config = live.artifact.config
    if config is None:
        raise UserError(f"run: {run} is a bare reward model, with no config of a run; give a finished rm run")
    rows, length = _size(settings)
    of_one = "data.path" in of_data
    data = of_file(live.data, live.data.path or "", rows) if of_one else live.data
    if not of_one and (config.get("rm") or {}).get("policy"):  # its rows were the policy's prompts
        data = data_of_pairs(data, (live.artifact.directory or Path()) / PAIRS)
    spec = spec_of(config["stage"])
    assert spec.rows
    prepared = prepare(data, spec.rows, live.encoder, length, cache_root())[0]
    examples = prepared.train if of_one else prepared.held_out
    objective = spec.objective_of(typed_config(completed(config)))
    batches = pack_by_tokens(objective.pack, examples)
    return own_metrics(scorer(live), batches, objective, torch.device(live.model.device), lambda: None)[0]


def _intervals(sets: list[EvalSet], metrics: dict[str, float]) -> dict[str, float]:
    found = {}
    for each in sets:
        if f"{each.name}/accuracy" in metrics:
            low, high = wilson(metrics[f"{each.name}/accuracy"], len(each.examples))
            found |= {f"{each.name}/accuracy_low": low, f"{each.name}/accuracy_high": high}
    return found


def show_evaluation(found: dict[str, dict[str, float]]) -> None:
    """Metrics down, runs across."""
    table = Table("held out", *found)
    for metric in dict.fromkeys(name for metrics in found.values() for name in metrics):
        table.add_row(metric, *(_shown(metrics[metric]) if metric in metrics else "" for metrics in found.values()))
    console.print(table)


def _shown(value: float) -> str:
    """A count in full."""
    return f"{value:,}" if isinstance(value, int) else f"{value:.4f}"
