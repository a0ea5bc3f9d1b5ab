"""Numbers that are counted otherwise here: batches, warm-up, betas, the schedule, held-out rows, what happens every so often."""

from __future__ import annotations

from typing import Any, cast

from posttrain.commands.bring.tools import AXOLOTL
from posttrain.commands.bring.translation import Translation, whole

_NEVER = ("no", "epoch", "best", "never")
_EVERY = {"save_steps": ("save_strategy",), "eval_steps": ("eval_strategy", "evaluation_strategy")}
MICRO = ("micro_batch_size", "per_device_train_batch_size")


def read_numbers(found: Translation) -> None:
    """Everything of optim, train and tracker whose number is not simply ours."""
    _read_batch(found)
    _read_warmup(found)
    _read_optimizer(found)
    _read_schedule(found)
    _read_held_out(found)
    _read_best(found)
    _read_often(found)
    _read_trackers(found)


def _read_batch(found: Translation) -> None:
    """Axolotl's batch_size is of a step: all the micro-batches of one process."""
    steps = found.number("max_steps")
    if steps is not None and steps >= 1 and "train.max_steps" not in found.settings:
        found.put("train.max_steps", whole(steps), "max_steps")
    if found.tool != AXOLOTL or "train.batch_size" in found.settings or not (total := found.number("batch_size")):
        return
    micro = found.number("micro_batch_size") or 1
    found.put("train.batch_size", whole(micro), "micro_batch_size")
    if (accum := found.take("gradient_accumulation_steps")) is None:
        found.put("train.grad_accum", max(1, int(total // micro)), "batch_size / micro_batch_size")
    else:
        found.put("train.grad_accum", accum, "gradient_accumulation_steps")


def _read_warmup(found: Translation) -> None:
    """A number of steps comes first, where it is one. transformers' `constant` has no warm-up at all."""
    steps, ratio = found.number("warmup_steps"), found.number("warmup_ratio")
    words = [word for word in ("warmup_steps", "warmup_ratio") if found.has(word)]
    if "constant" in (found.tree.get("lr_scheduler"), found.tree.get("lr_scheduler_type")):
        found.put("optim.warmup_ratio", 0.0, "lr_scheduler: constant, which has no warm-up there")
    elif steps is not None and 0 < steps < 1:
        found.put("optim.warmup_ratio", steps, "warmup_steps")
    elif steps or (steps is not None and not ratio):
        found.put("optim.warmup_steps", whole(steps), "warmup_steps")
        if ratio:
            found.note("warmup_ratio", ratio, "warmup_steps comes first")
    elif ratio is not None:
        found.put("optim.warmup_ratio", ratio, words[-1])


def _read_optimizer(found: Translation) -> None:
    first, second = found.number("adam_beta1"), found.number("adam_beta2")
    if first is not None and second is not None:
        found.put("optim.betas", [first, second], "adam_beta1, adam_beta2")
    for word in ("max_grad_norm", "gradient_clipping"):
        if (norm := found.number(word)) is not None:
            found.put("optim.max_grad_norm", whole(norm) or None, word)  # 0 there: no clipping


def _read_schedule(found: Translation) -> None:
    """Where the rate ends: a rate here, a share of the rate there."""
    given = found.tree.get("lr_scheduler_kwargs")
    given = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
    share, rate = found.number("cosine_min_lr_ratio") or given.get("min_lr_rate"), found.tree.get("learning_rate")
    if given.keys() <= {"min_lr", "min_lr_rate"}:
        found.take("lr_scheduler_kwargs")
    if given.get("min_lr"):
        found.put("optim.min_lr", given["min_lr"], "lr_scheduler_kwargs")
    elif isinstance(share, float) and isinstance(rate, int | float):
        found.put("optim.min_lr", float(f"{share * rate:.6g}"), "a share of learning_rate")
    elif share:
        found.note("cosine_min_lr_ratio", share, "optim.min_lr is a rate; say it")


def _read_held_out(found: Translation) -> None:
    """A share of the rows, of which few are measured here, or a number of rows."""
    for word in ("val_set_size", "val_size"):
        if (value := found.number(word)) is None:
            continue
        if 0 < value < 1:
            found.put("data.eval_share", value, word)
            why = "at most data.eval_rows of them are held out here, and the others trained on; data.eval_rows=N holds out more"
            found.unsaid.append((word, why))
            continue
        found.put("data.eval_rows", whole(value), word)
        if value:
            found.put("data.eval_share", 0.5, f"{word}: so many rows are found in half of them")


def _read_best(found: Translation) -> None:
    """The metric decides on the result where the best checkpoint is asked for, and else when to stop."""
    best, metric = found.take("load_best_model_at_end"), found.take("metric_for_best_model")
    ours = "eval/loss" if metric in (None, "loss", "eval_loss") else None
    stops = any(found.has(word) for word in ("early_stopping_patience", "early_stopping_steps"))
    if metric is not None and ours is None:
        found.note("metric_for_best_model", metric, "train.keep_best=NAME is a metric of metrics.jsonl")
    elif best is True:
        found.put("train.keep_best", ours, "load_best_model_at_end")
    elif metric is not None and stops:
        found.put("train.early_stopping.metric", ours, "metric_for_best_model")
    elif metric is not None:
        found.note("metric_for_best_model", metric, "without load_best_model_at_end it decides nothing")


def _read_often(found: Translation) -> None:
    """What is saved and measured every so many steps, where that is the strategy."""
    for word, strategies in _EVERY.items():
        said = next((str(found.tree[each]) for each in strategies if found.has(each)), "")
        said = "no" if said == "False" else said  # YAML's own no
        if said in _NEVER and found.has(word):
            found.note(word, found.take(word), f"{strategies[0]} is {said}")
        if word == "eval_steps" and said == "steps" and not found.has(word) and found.has("logging_steps"):
            found.put("train.eval_steps", found.tree["logging_steps"], "eval_strategy: steps, as often as logging_steps")
    for word in ("save_steps", "eval_steps", "logging_steps"):
        if isinstance(value := found.tree.get(word), float) and not value.is_integer():
            found.note(word, found.take(word), "a share of the steps; ours counts steps")


def _read_trackers(found: Translation) -> None:
    for word, tracker in (("wandb_project", "wandb"), ("trackio_project_name", "trackio")):
        if found.has(word):
            found.put("tracker", tracker, word)
    if isinstance(trackers := found.tree.get("report_to"), list):
        for other in cast("list[Any]", trackers)[1:]:
            found.note("report_to", other, "tracker is one")
        found.tree["report_to"] = trackers[0] if trackers else None
