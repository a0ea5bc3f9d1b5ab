"""3. What a language stage trains on, what is measured, and what holds it to its start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from posttrain.batch import Metrics, PackedBatch
from posttrain.config.schema import Guarded, LanguageStage
from posttrain.console import say
from posttrain.data.collate import zero_weight
from posttrain.evaluation.forgetting import forgetting_percent
from posttrain.evaluation.held_out import EvalSet, own_metrics, pack_by_tokens, set_metrics
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.routers import router_coefficient
from posttrain.runs.cache_place import cache_root
from posttrain.runs.earlier import CURRICULUM
from posttrain.runs.identity import content_hash
from posttrain.stages.language.answers import keeper
from posttrain.stages.language.balance import with_balance
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.curriculum import apply_curriculum
from posttrain.stages.language.ewc import EwcPenalty, fisher
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.precision import computes_in_float16
from posttrain.stages.resume import order_hash
from posttrain.stages.steps import Context, Measured, Session, Training
from posttrain.training.callbacks import StepCallback, together
from posttrain.training.objective import LossFunction, Objective, Update

Compared = Callable[[PackedBatch, list[int]], PackedBatch]  # a training batch, its units -> with what it is compared with


@dataclass(frozen=True)
class References:
    """What a stage compares with: its held-out batches, what is put into those that it trains on, and the digest of that.
    before_step, before_measuring: what the weights of the moment say of all batches together is put into each; the former is
    told the batches' units, and every process must call it."""

    held_out: list[PackedBatch]
    compared: Compared = lambda batch, units: batch
    digest: dict[str, Any] = field(default_factory=dict)
    before_step: Callable[[list[PackedBatch], list[list[int]]], list[PackedBatch]] = lambda batches, units: batches
    before_measuring: Callable[[list[PackedBatch]], list[PackedBatch]] = lambda batches: batches


MakeReferences = Callable[[Context, PreparedData, Session], References]


def train_language(
    context: Context,
    data: PreparedData,
    model: TrainableModel,
    session: Session,
    objective: Objective[PackedBatch],
    make_references: MakeReferences | None = None,
) -> Training[PackedBatch]:
    """Updates of one batch a step. make_references: of a loss that compares with the start."""
    data, difficulty = apply_curriculum(context, data, session, objective)
    if make_references:
        references = make_references(context, data, session)
    else:
        references = References(pack_by_tokens(objective.pack, data.data.held_out))

    def updates(step: int) -> Iterator[Update[PackedBatch]]:
        metrics = {} if difficulty is None else _difficulty(difficulty, data.order.step(step))
        units = [each or [0] for each in data.order.micro(step, session.accelerator.process_index)]
        batches = _batches(data, objective, references.compared, step, session.accelerator.process_index)
        yield Update(references.before_step(batches, units), metrics)

    def measure(done: int, check: Callable[[], None]) -> Measured:
        held_out = references.before_measuring(references.held_out)
        metrics, rows = own_metrics(session.module, held_out, objective, context.device, check)
        if data.prompts:
            keep = keeper(context.directory, done, data.order.num_steps)
            with session.accelerator.autocast():
                metrics |= data.prompts.measure(cast(PackedLM, session.module), session.processes, keep)
        if data.tasks:
            metrics |= data.tasks.during(done, cast(PackedLM, session.module), session)
        return Measured(metrics, rows)

    return Training(
        updates=updates,
        loss=balanced_loss(context, objective, session),
        measure=measure,
        measure_around=measure_sets(context, data, session),
        compare=compare_ends,
        references=references.digest if difficulty is None else {**references.digest, CURRICULUM: order_hash(data.order)},
        callback=step_callback(context, data, model, session),
        checkpoint_gate=checkpoint_gate(context, data, session),
        data=data,
    )


def balanced_loss(context: Context, objective: Objective[PackedBatch], session: Session) -> LossFunction[PackedBatch]:
    """The objective's loss in training, with `train.router_aux_loss`. What is measured stays the objective's alone."""
    lm = cast(PackedLM, session.module)
    coefficient = router_coefficient(lm.causal, context.cfg.train.router_aux_loss)
    if coefficient:
        say(f"the loss has {coefficient:g} times the routers' balance (train.router_aux_loss)")
    return with_balance(objective.training_loss or objective.loss, lm, coefficient)


def _batches(
    data: PreparedData, objective: Objective[PackedBatch], compared: Compared, step: int, rank: int
) -> list[PackedBatch]:
    """This process's micro-batches of a step."""
    batches = []
    for units in data.order.micro(step, rank):
        drawn = units or [0]  # a process that has run out goes along with the others, and counts for nothing
        batch = compared(objective.pack(data.data.train, drawn), drawn)
        batches.append(batch if units else zero_weight(batch))
    return batches


def _difficulty(difficulty: NDArray[np.floating], units: Any) -> Metrics:
    drawn = torch.from_numpy(difficulty[units])
    return {"difficulty": (drawn.sum(), float(len(drawn)))}


def measure_sets(context: Context, data: PreparedData, session: Session) -> Callable[[bool], Measured]:
    """Figures of `eval.sets`, before and after the run. Those of the start are kept in the cache."""

    def measure(after: bool) -> Measured:
        function = None if after else data.function(context.cfg)
        agree = session.processes.all_say
        found, rows = set_metrics(session.module, data.sets, function, cache_root(), context.device, context.check, agree)
        tasks = data.tasks.at_end(policy_of(session.module), session) if data.tasks else {}
        return Measured(found | tasks, rows)

    return measure


def policy_of(module: Any) -> PackedLM:
    """The language model among what is trained."""
    if not hasattr(module, "policy"):
        return module
    module.set_role("policy")
    return module.policy


def compare_ends(before: dict[str, float], after: dict[str, float]) -> dict[str, float]:
    """Forgetting, where general text was measured at both ends."""
    if "general/loss" not in after:
        return {}
    return {"forgetting/percent": forgetting_percent(before["general/loss"], after["general/loss"])}


def step_callback(context: Context, data: PreparedData, model: TrainableModel, session: Session) -> StepCallback | None:
    """What the method does in a step, and EWC's pull, where there are such."""
    found: list[StepCallback] = [model.callback] if model.callback else []
    cfg: LanguageStage = context.cfg
    if isinstance(cfg, Guarded) and cfg.ewc.lam:
        plain = session.module
        importance = None
        if data.ewc_text is not None:
            trained = [cfg.peft.model_dump(), cfg.train.seed, EvalSet("", data.ewc_text, "").fingerprint()]
            scaled = computes_in_float16(cfg)
            trained += ["scaled"] if scaled else []  # caches of 0.1 have what float16 left of it
            make = partial(fisher, plain, data.ewc_text, context.device, context.check, scaled)
            importance = session.cached("fisher", content_hash(data.function(cfg), trained), make)
        found.append(EwcPenalty(plain, importance, cfg.ewc.lam))
    return together(found)


def checkpoint_gate(context: Context, data: PreparedData, session: Session) -> Callable[[int], bool] | None:
    """Whether general text is still within forgetting.budget, which is looked at before every checkpoint."""
    cfg: LanguageStage = context.cfg
    if not isinstance(cfg, Guarded) or cfg.forgetting.budget is None:
        return None
    budget, stops = cfg.forgetting.budget, cfg.forgetting.action == "stop"
    general = [each for each in data.sets if each.name == "general"]

    def within(done: int) -> bool:
        found, _ = set_metrics(session.module, general, None, cache_root(), context.device, lambda: None)
        percent = forgetting_percent(session.state.before["general/loss"], found["general/loss"])
        percent = session.processes.told(partial(float, percent))  # or machines that round differently part here
        session.tracker.log(done, found | {"forgetting/percent": percent})
        if percent <= budget:
            session.state.within_budget = done
            return True
        say(f"step {done}: forgetting is {percent:+.2f} %, more than forgetting.budget={budget:g}%")
        return not stops

    return within
