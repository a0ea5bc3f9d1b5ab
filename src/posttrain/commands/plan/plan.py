"""`posttrain plan`: what a run will cost in memory and time, before anything is loaded."""

from __future__ import annotations

import math
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from posttrain.commands.plan.images import image_plan
from posttrain.commands.plan.memory import count
from posttrain.config.compose import compose_run
from posttrain.config.memory_savers import memory_savers
from posttrain.config.stages import typed_config
from posttrain.console import console, say
from posttrain.data.selection import replays, sources_of
from posttrain.data.sources.source import is_local
from posttrain.errors import UserError
from posttrain.models.checkpoints.use import use_of
from posttrain.models.hub import resolve
from posttrain.models.trust import pin_of
from posttrain.stages.language.init import InitSource, find_base, resolve_start
from posttrain.stages.spec import StageSpec, spec_of
from posttrain.stages.steps import Context
from posttrain.tensors import numbers_in

GB = 1e9
# Dense bfloat16 peak in FLOP/s, by a part of the card's name; training reaches about USED of it.
CARDS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "L4": 121e12, "4090": 165e12, "3090": 71e12, "T4": 65e12}
USED = 0.4


def make_plan(stage: str, words: list[str], memory: int | None = None) -> dict[str, Any]:
    """Memory by part, per device, whether it fits, what would make it fit, steps, tokens and time; ready for JSON.

    memory: bytes to fit in; None: this machine's. Raises UserError as the run itself would.
    """
    capacity, device = (memory, "the given memory") if memory else capacity_here()
    plan = _plan(stage, words, capacity)
    plan |= {"capacity_bytes": capacity, "device": device}
    plan["changes"] = [] if plan["fits"] else _changes(stage, words, capacity)
    return plan


def _plan(stage: str, words: list[str], capacity: int) -> dict[str, Any]:
    cfg, spec = typed_config(compose_run(stage, words)), spec_of(stage)
    if spec.reads == "images":
        plan = image_plan(cfg, capacity)
        plan["seconds"] = _seconds(plan["flops"], 1, cfg.base_dtype)
        return plan
    return _language_plan(cfg, spec, capacity)


def _language_plan(cfg: Any, spec: StageSpec, capacity: int) -> dict[str, Any]:
    from posttrain.models.language.architecture import config_of

    data = _data(cfg, spec)
    shards = cfg.train.processes if cfg.train.fsdp else 1
    tokens = min(cfg.train.batch_size * data.longest, data.largest_batch)
    directory = resolve(data.start.source, cfg.model.revision, weights=False).directory
    model = config_of(directory, pin_of(cfg.model))
    use = use_of(directory, cfg.quant, cfg.base_dtype)
    held = cfg.model_copy(update={"quant": use.layers})  # a checkpoint's own format takes what its layers take
    found = count(held, model, tokens, cfg.train.batch_size, _frozen_bytes(data.start), use.held_bytes())
    sharded = ("weights", "adapters", "frozen adapter", "gradients", "optimizer")
    memory = {part: size / shards if part in sharded else size for part, size in found.parts.items()}
    extra = spec.plan_of().extra(cfg, data.units, found.parts, model, data.base)
    memory |= extra.memory
    fixed, recomputes = sum(memory.values()), cfg.train.gradient_checkpointing
    kept = found.activations_recomputed if recomputes is True else found.activations
    if recomputes == "auto":  # as many layers as it takes, whose share of both figures this is
        kept = max(min(kept, capacity - fixed), found.activations_recomputed)
    seconds = _seconds(found.flops / tokens, extra.passes * data.tokens / cfg.train.processes, cfg.base_dtype)
    return {
        "stage": cfg.stage,
        "model": cfg.model.name,
        "method": cfg.peft.name,
        "quant": cfg.quant.name,
        "checkpoint": use.lines(),
        "total_parameters": found.total_parameters + extra.total + _frozen_numbers(data.start),
        "trained_parameters": found.trained_parameters + extra.trained,
        "memory": {part: round(size) for part, size in (memory | {"activations": kept}).items() if size},
        "memory_with_recomputation": round(fixed + found.activations_recomputed),
        "memory_without_recomputation": round(fixed + found.activations),
        "total_bytes": round(fixed + kept),
        "fits": fixed + kept <= capacity,
        "micro_batch_tokens": tokens,
        "steps": data.steps,
        "tokens": round(data.tokens),
        "tokens_are": data.tokens_are,
        "seconds": seconds,
        "assumptions": _assumptions(cfg, seconds, [line for line in (found.reading, *extra.notes) if line]),
    }


def _frozen_bytes(start: InitSource) -> float:
    """Bytes of the adapter that will lie under a new one."""
    return float((start.adapter / "adapter_model.safetensors").stat().st_size) if start.adapter and start.mode == "stack" else 0.0


def _frozen_numbers(start: InitSource) -> int:
    """Parameters of the adapter that will lie under a new one."""
    return numbers_in(start.adapter) if start.adapter and start.mode == "stack" else 0


@dataclass(frozen=True)
class _Data:
    """Steps and tokens: exact where the rows are at hand, else at most."""

    start: InitSource
    base: str
    longest: int
    largest_batch: int
    units: int
    steps: int
    tokens: float
    tokens_are: str


def _data(cfg: Any, spec: StageSpec) -> _Data:
    """By the stage's own first step, where the rows are at hand."""
    train = cfg.train
    if replays(cfg.data) or not all(is_local(source.path) for source in sources_of(cfg.data).values()):
        if not train.max_steps:
            raise UserError(
                f"train.max_steps: the rows of {cfg.data.path} are not at hand, so give the number of steps to plan for"
            )
        units, start = train.max_steps * train.batch_size * train.grad_accum * train.processes, resolve_start(cfg, weights=False)
        base = find_base(start, cfg.model.revision, weights=False)
        length, batch = train.max_length, train.batch_size * train.max_length
        return _Data(start, base.path, length, batch, units, train.max_steps, units * length, "at most")
    context = Context(cfg, Path(), train.processes, True, torch.device("cpu"), lambda: None, weights=False)
    found = spec.steps_of(cfg).prepare(context).data
    examples, order = found.data.train, found.order
    lengths = spec.plan_of().unit_tokens(cfg, examples)
    largest = int(sum(sorted(lengths.tolist())[-train.batch_size :]))
    counted = min(order.num_steps, 2000)
    tokens = sum(int(lengths[unit]) for step in range(counted) for unit in order.step(step)) * order.num_steps / counted
    exact = "exact" if order.num_steps <= 2000 else "about"
    return _Data(found.start, found.base.path, int(lengths.max()), largest, len(examples), order.num_steps, tokens, exact)


def _changes(stage: str, words: list[str], capacity: int) -> list[dict[str, Any]]:
    """The first three single changes, in the order one would try them, with which the run fits; else several together."""
    tries, fitting = memory_savers(typed_config(compose_run(stage, words))), []
    for change in tries:
        plan = _plan_or_none(stage, [*words, *change.split()], capacity)
        if plan and plan["fits"]:
            fitting.append({"override": change, "total_bytes": plan["total_bytes"], "fits": True})
        if len(fitting) == 3:
            break
    return fitting or _together(stage, words, tries, capacity)


def _together(stage: str, words: list[str], tries: list[str], capacity: int) -> list[dict[str, Any]]:
    """One change after another, each kept if it goes with the ones before and output something, until the run fits."""
    kept: list[str] = []
    best: dict[str, Any] = {"total_bytes": math.inf, "fits": False}
    for change in tries:
        plan = _plan_or_none(stage, [*words, *kept, *change.split()], capacity)
        if plan and plan["total_bytes"] < best["total_bytes"] and not best["fits"]:
            best, kept = plan, [*kept, *change.split()]
    return [{"override": " ".join(kept), "total_bytes": best["total_bytes"], "fits": best["fits"]}] if kept else []


def _plan_or_none(stage: str, words: list[str], capacity: int) -> dict[str, Any] | None:
    """None where the settings do not go together."""
    try:
        return _plan(stage, words, capacity)
    except UserError:
        return None


def capacity_here() -> tuple[int, str]:
    """Bytes of the first GPU, else of this machine's memory that is free to take."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        return properties.total_memory, properties.name
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
        free = re.search(r"MemAvailable:\s+(\d+) kB", text)
        return int(free[1] if free else 0) * 1024, "this machine's memory"
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), "this machine's memory"


def parse_memory(text: str | None) -> int | None:
    """`48GB`, `23.5GiB` or a number of bytes. Raises UserError."""
    if text is None:
        return None
    found = re.fullmatch(r"\s*([0-9.]+)\s*(B|[KMGT]i?B)?\s*", text, flags=re.IGNORECASE)
    if not found:
        raise UserError(f"--memory: '{text}' is no size; write 48GB or 24GiB")
    unit = (found[2] or "B").upper()
    return int(float(found[1]) * (1024 if "I" in unit else 1000) ** "BKMGT".index(unit[0]))


def _seconds(flops_a_token: float, tokens: float, dtype: str) -> float | None:
    rate = _rate(dtype)
    return round(flops_a_token * tokens / rate, 1) if rate else None


def _rate(dtype: str) -> float | None:
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name(0)
        peak = next((peak for part, peak in CARDS.items() if part in name), None)
        return peak * USED if peak else None
    side = 768
    a = torch.ones(side, side, dtype=getattr(torch, dtype))
    _ = a @ a
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        _ = a @ a
        done += 1
    return 2 * side**3 * done / (time.perf_counter() - began) * 0.7  # the rest of a step is not matrix products


def _assumptions(cfg: Any, seconds: float | None, notes: list[str]) -> list[str]:
    said = ["the largest micro-batch decides on memory; a framework's own workspace (about 1 GB on CUDA) is not in it", *notes]
    if seconds is None:
        said.append("no rate is known for this card, so no time is given")
    else:
        said.append(
            f"time is an estimate from {'a measured product of matrices' if not torch.cuda.is_available() else '40 % of peak'}"
        )
    if cfg.optim.name != "adamw" and not torch.cuda.is_available():
        said.append(f"optim={cfg.optim.name} needs CUDA: plain AdamW is counted, as it would run here")
    return said


def show_plan(plan: dict[str, Any]) -> None:
    """The plan as a table and some lines."""
    table = Table("memory of one device", "GB")
    for part, size in plan["memory"].items():
        table.add_row(part, f"{size / GB:.3f}")
    table.add_row("total", f"{plan['total_bytes'] / GB:.3f}", style="bold")
    say(f"{plan['stage']} of {plan['model']}, peft={plan['method']} quant={plan['quant']}")
    for line in plan.get("checkpoint", []):
        say(line)
    trained, total = plan["trained_parameters"], plan["total_parameters"]
    say(f"training {trained:,} of {total:,} parameters ({trained / total:.2%})")
    console.print(table)
    verdict = "fits in" if plan["fits"] else "does not fit in"
    say(f"{verdict} {plan['capacity_bytes'] / GB:.1f} GB ({plan['device']})")
    say(f"with all layers recomputed (train.gradient_checkpointing=true): {plan['memory_with_recomputation'] / GB:.3f} GB")
    for change in plan["changes"]:
        outcome = "fits" if change["fits"] else "still too much"
        say(f"  {change['override']}: {change['total_bytes'] / GB:.3f} GB, {outcome}")
    clock = f", about {plan['seconds'] / 60:.0f} min" if plan["seconds"] else ""
    if "images" in plan:
        work = f"{plan['images']:,} pictures of {plan['image_side']}x{plan['image_side']}"
    else:
        work = f"{plan['tokens_are']} {plan['tokens']:,} tokens"
    say(f"{plan['steps']:,} steps, {work}{clock}")
    for line in plan["assumptions"]:
        say(f"- {line}")
