"""What a model knows before and after a stage: the stage's own held-out rows, and every set in `eval.sets`."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from posttrain.batch import PackedBatch
from posttrain.console import Meter
from posttrain.data.examples import Examples
from posttrain.evaluation.paired import HIGH, LOW
from posttrain.models.language.objectives import LABELLED, LIKELIHOOD, TOKENS
from posttrain.runs.cache import alone, cached_json, write_cached_json
from posttrain.training.metrics import evaluate
from posttrain.training.objective import Objective

EVAL_TOKENS = 2048  # a forward pass without gradients; rows are taken together up to so many tokens


ROWS = "rows"  # of a measurement in the cache: a value for each row
ANSWER = "answer"  # the set of held-out rows in which only what stands behind the reasoning counts
Rows = dict[str, list[float]]  # name -> a value for each held-out unit


@dataclass(frozen=True)
class EvalSet:
    """One set of `eval.sets`: its examples, its kind (text, conversation, pairs or labelled) and a hash of both."""

    name: str
    examples: Examples
    kind: str

    @property
    def objective(self) -> Objective[PackedBatch]:
        """The objective by which the set is measured."""
        return {"pairs": LIKELIHOOD, "labelled": LABELLED}.get(self.kind, TOKENS)

    def fingerprint(self) -> str:
        """A hash of the examples and their kind."""
        content = (self.examples.tokens, self.examples.weights, self.examples.offsets, self.examples.splits)
        return hashlib.sha256(b"".join(a[:].tobytes() for a in content) + self.kind.encode()).hexdigest()


def pack_by_tokens(
    pack: Callable[[Examples, Sequence[int]], PackedBatch], examples: Examples, most: int = EVAL_TOKENS
) -> list[PackedBatch]:
    """All units in order, as many to a batch as fit `most` tokens."""
    return [pack(examples, units) for units in by_tokens(examples, most)]


def by_tokens(examples: Examples, most: int) -> Iterator[list[int]]:
    """Units in order, as many together as have at most so many tokens."""
    units: list[int] = []
    total = 0
    for unit, size in enumerate(examples.unit_tokens().tolist()):
        if units and total + size > most:
            yield units
            units, total = [], 0
        units.append(unit)
        total += size
    if units:
        yield units


def own_metrics(
    module: nn.Module,
    batches: list[PackedBatch],
    objective: Objective[PackedBatch],
    device: torch.device,
    each: Callable[[], None],
) -> tuple[dict[str, float], Rows]:
    """The stage's own held-out metrics, as eval/loss, eval/accuracy, ..., and the values of each unit; empty where no row is
    held out."""
    if not batches:
        return {}, {}
    found, rows = evaluate(module, batches, objective.loss, device, each)
    found |= {"perplexity": math.exp(found["loss"])} if objective.perplexity else {}
    found |= objective.summary(rows) if objective.summary else {}
    return {f"eval/{name}": value for name, value in found.items()}, {name: values.tolist() for name, values in rows.items()}


def set_metrics(
    module: nn.Module,
    sets: list[EvalSet],
    identity: str | None,
    cache: Path,
    device: torch.device,
    check: Callable[[], None],
    agree: Callable[[bool], bool] = alone,
) -> tuple[dict[str, float], Rows]:
    """<set>/loss, <set>/perplexity or <set>/accuracy of every set, and each row's loss as <set>/loss and <set>/loss_count.

    With an `identity` (a hash of the model's weights and precision) each figure is computed once and then read from the cache.
    agree: see `cached_json`.
    """
    named, rows = dict[str, float](), Rows()
    for each in sets:
        measure = partial(_measured, module, each, device, check)
        found = cached_json(_path(each, identity, cache), measure, agree=agree) if identity else measure()
        rows |= {f"{each.name}/{name}": values for name, values in found.get(ROWS, {}).items()}  # not every objective has any
        found = {name: value for name, value in found.items() if name != ROWS}
        named |= {f"{each.name}/{name}": value for name, value in found.items()}
        if each.name == ANSWER:
            counted = float((each.examples.weights[:] != 0).sum())
            named[f"{ANSWER}/logp"] = -found["loss"] * counted / len(each.examples.rows)  # of a whole answer
        if each.kind == "text":
            named[f"{each.name}/perplexity"] = math.exp(found["loss"])
    return named, rows


def remember(sets: list[EvalSet], metrics: dict[str, float], rows: Rows, identity: str, cache: Path) -> None:
    """Keep what was measured on the weights called `identity`: the next stage starts from them."""
    for each in sets:
        names = [n for n in metrics if n.startswith(f"{each.name}/") and not n.endswith(("perplexity", "/logp", LOW, HIGH))]
        kept = {n.split("/", 1)[1]: values for n, values in rows.items() if n.startswith(f"{each.name}/")}
        found: dict[str, Any] = {n.split("/", 1)[1]: metrics[n] for n in names}
        write_cached_json(_path(each, identity, cache), found | ({ROWS: kept} if kept else {}))


def _measured(module: nn.Module, each: EvalSet, device: torch.device, check: Callable[[], None]) -> dict[str, Any]:
    batches = pack_by_tokens(each.objective.pack, each.examples)
    with Meter(each.name, len(batches)) as meter:

        def advance() -> None:
            meter.advance()
            check()

        found, rows = evaluate(module, batches, each.objective.loss, device, advance)
    return {**found, **({ROWS: {name: values.tolist() for name, values in rows.items()}} if rows else {})}


def _path(each: EvalSet, identity: str, cache: Path) -> Path:
    key = f"{identity} {each.fingerprint()} {ROWS}"  # ROWS: earlier versions kept no rows, and cannot read a file that has them
    return cache / "measured" / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.json"
