"""`posttrain eval`: what a finished run's result, or a bare model, makes of held-out rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from posttrain.config.schema import DataConfig
from posttrain.config.stages import REGISTRY, typed_config
from posttrain.config.stored import completed
from posttrain.console import console, say
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import options_of
from posttrain.data.prepare import held_out_of, prepare, prepare_set
from posttrain.errors import UserError, did_you_mean
from posttrain.evaluation.calibration import wilson
from posttrain.evaluation.held_out import EvalSet, own_metrics, pack_by_tokens, set_metrics
from posttrain.models.language.loading import LoadedModel, device_here, load_model, load_models, scorer, switch
from posttrain.models.language.packed_lm import PackedLM
from posttrain.runs.artifact import open_artifact
from posttrain.runs.cache import cache_root
from posttrain.stages.spec import spec_of

KEYS = ("data.path", "rows", "max_length", "tasks", "limit")
DEFAULTS = {"rows": 256, "max_length": 1024}


def evaluate_runs(words: list[str]) -> dict[str, dict[str, float]]:
    """Figures of every run (or model) among `words`; the other words are KEY=VALUE settings.

    data.path=FILE: text gives loss and perplexity, conversations the loss of the responses, pairs the share of preferences that
    the model has by its own likelihood a token, with a 95 % interval. Without it: what the run's own config holds out. tasks=A,B:
    tasks of lm-eval. Raises UserError before a model is loaded.
    """
    runs, settings = _sort_words(words)
    if len(runs) == 1 and open_artifact(runs[0], "run").reward_head:
        return {Path(runs[0]).name: _scored(runs[0], settings)}
    live, names = load_models(runs, device_here())
    if "tasks" in settings:
        return {name: _lm_eval(live, names, name, settings) for name in names}
    sets = _sets(live, settings)
    found = {}
    for name in names:
        switch(live, names, name)
        lm = PackedLM(live.model, kernels=live.kernels)
        metrics = set_metrics(lm, sets, None, cache_root(), torch.device(live.model.device), lambda: None)
        found[name] = metrics | _intervals(sets, metrics)
    return found


def _sort_words(words: list[str]) -> tuple[list[str], dict[str, str]]:
    runs, settings = [], {}
    for word in words:
        key, separator, value = word.partition("=")
        if not separator or "/" in key:
            runs.append(word)
        elif key not in KEYS:
            raise UserError(f"unknown key '{key}'{did_you_mean(key, list(KEYS))} (there are: {', '.join(KEYS)})")
        else:
            settings[key] = value
    if not runs:
        raise UserError("give a run directory, or a model: posttrain eval RUN data.path=FILE")
    for key in ("rows", "max_length", "limit"):
        if key in settings and not settings[key].isdigit():
            raise UserError(f"{key}: '{settings[key]}' is no whole number")
    return runs, settings


def _sets(live: LoadedModel, settings: dict[str, str]) -> list[EvalSet]:
    encoder = live.encoder
    rows, length = (int(settings.get(key, DEFAULTS[key])) for key in ("rows", "max_length"))
    if "data.path" in settings:
        return [EvalSet("data", *prepare_set(settings["data.path"], rows, encoder, length))]
    config = live.artifact.config
    if config is None:
        raise UserError("data.path: a bare model holds nothing out; give data.path=FILE")
    config = completed(config)
    wanted, encoder = config["eval"], encoder.reading_as(options_of(DataConfig.model_validate(config["data"])))
    named = (wanted["sets"] or {}).items()
    sets = [EvalSet(name, *prepare_set(path, wanted["rows"], encoder, wanted["max_length"])) for name, path in named]
    return [*_own_set(config, encoder), *sets]


MEASURED_AS = {"documents": "text", "conversations": "conversation", "pairs": "pairs"}  # examples of a stage -> kind of a set


def _own_set(config: dict[str, Any], encoder: Encoder) -> list[EvalSet]:
    """What the run held out itself, where a likelihood says something about it: not of prompts, which have no known answer."""
    spec = REGISTRY.get(config["stage"]) if config["stage"] in REGISTRY.names() else None
    kind = MEASURED_AS.get(spec.rows.examples) if spec and spec.rows else None
    if spec is None or kind is None:
        say(f"{config['stage']}: its own held-out rows are not measured by likelihood; eval.sets are, or give data.path=FILE")
        return []
    data = DataConfig.model_validate(config["data"])
    own = held_out_of(data, spec.rows, encoder, config["train"]["max_length"], cache_root())
    return [EvalSet("eval", own, kind)] if len(own) else []


def _scored(run: str, settings: dict[str, str]) -> dict[str, float]:
    """A reward model's figures on the pairs at data.path, or on those that its run has held out."""
    if "tasks" in settings:
        raise UserError(f"tasks: {run} is a reward model, which writes nothing")
    live = load_model(run, device_here())
    encoder = live.encoder
    config = live.artifact.config
    if config is None:
        raise UserError(f"run: {run} is a bare reward model, with no config of a run; give a finished rm run")
    rows, length = int(settings.get("rows", DEFAULTS["rows"])), int(settings.get("max_length", DEFAULTS["max_length"]))
    config = completed(config)
    data = config["data"]
    if "data.path" in settings:
        data = data | {
            "path": settings["data.path"],
            "sources": None,
            "alpha": None,
            "shape": "auto",
            "eval_path": None,
            "eval_share": 0.0,
            "skip_rows": 0,
            "max_rows": rows,
        }
    spec = spec_of(config["stage"])
    assert spec.rows
    prepared = prepare(DataConfig.model_validate(data), spec.rows, encoder, length, cache_root())[0]
    examples = prepared.train if "data.path" in settings else prepared.held_out
    objective = spec.objective_of(typed_config(config))
    batches = pack_by_tokens(objective.pack, examples)
    return own_metrics(scorer(live), batches, objective, torch.device(live.model.device), lambda: None)[0]


def _intervals(sets: list[EvalSet], metrics: dict[str, float]) -> dict[str, float]:
    found = {}
    for each in sets:
        if f"{each.name}/accuracy" in metrics:
            low, high = wilson(metrics[f"{each.name}/accuracy"], len(each.examples))
            found |= {f"{each.name}/accuracy_low": low, f"{each.name}/accuracy_high": high}
    return found


def _lm_eval(live: LoadedModel, names: list[str], name: str, settings: dict[str, str]) -> dict[str, float]:
    try:
        from lm_eval import simple_evaluate  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError(f"tasks: lm-eval is not installed ({error}); pip install 'posttrain[eval]'") from None
    switch(live, names, name)
    limit = int(settings["limit"]) if "limit" in settings else None
    found: Any = simple_evaluate(
        model=HFLM(pretrained=live.model, tokenizer=live.tokenizer), tasks=settings["tasks"].split(","), limit=limit
    )
    return {
        f"{task}/{metric.split(',')[0]}": value
        for task, metrics in found["results"].items()
        for metric, value in metrics.items()
        if isinstance(value, float)
    }


def show_evaluation(found: dict[str, dict[str, float]]) -> None:
    """Metrics down, runs across."""
    table = Table("held out", *found)
    for metric in dict.fromkeys(name for metrics in found.values() for name in metrics):
        table.add_row(metric, *(f"{metrics[metric]:.4f}" if metric in metrics else "" for metrics in found.values()))
    console.print(table)
