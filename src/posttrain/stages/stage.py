"""A run from its config to its manifest: the same numbered steps for every stage, each of which returns what the next ones need.

    1. prepare    read everything a mistake can be in; no weight is loaded
    2. build      the model, with what is trained of it
    3. training   what a step draws, its loss, what is measured, and what training compares with
    4. train      the loop (training/loop.py), from the start or from a checkpoint
    5. measure    the held-out figures after it
    6. save       the result, and manifest.json last

A stage brings 1, 2, 3 and 6 (`Steps`); order, checkpoints, resume, signals and the manifest's common part are here.
"""

from __future__ import annotations

import math
import os
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

from accelerate import Accelerator
from torch import nn

from posttrain.config.metrics import direction
from posttrain.config.schema import TrainConfig
from posttrain.console import say
from posttrain.devices.device import Device
from posttrain.devices.seen import remarks, seen
from posttrain.errors import Stopped, UserError, of_all
from posttrain.evaluation.paired import change_bounds, losses_of
from posttrain.models.counting import in_words
from posttrain.reports.card import write_card
from posttrain.reports.live import LivePage
from posttrain.reports.run_page import run_page
from posttrain.runs.directory import Run
from posttrain.runs.manifest import MANIFEST
from posttrain.stages.accelerator import make_accelerator, products_beside_autocast
from posttrain.stages.headline import headline
from posttrain.stages.manifest import common_record, show_outcome
from posttrain.stages.precision import computes_in_float16, settled
from posttrain.stages.resume import History, agree_on, open_history, order_hash
from posttrain.stages.steps import Context, Measured, Outcome, Prepared, Session, Steps, Trainable, Training
from posttrain.training import loss_scale
from posttrain.training.best import Judge
from posttrain.training.checkpoint import Checkpoint, check_room
from posttrain.training.gradients import begin_alike
from posttrain.training.guard import GuardConfig
from posttrain.training.loop import Loop
from posttrain.training.loop_parts import LoopConfig
from posttrain.training.optimizer import group_rates, make_optimizer, require_optimizer
from posttrain.training.processes import Processes, is_lost_process
from posttrain.training.sharding import shard
from posttrain.training.signals import StopSignal
from posttrain.training.tracking import Tracker


def run_stage(cfg: Any, run: Run, steps: Steps[Any, Any, Any]) -> dict[str, Any]:
    """Train to the end, or go on where a checkpoint left off; returns the manifest. Raises UserError, RunError or Stopped."""
    stop = StopSignal()
    try:
        index = int(os.environ.get("LOCAL_RANK", "0"))
        device = Device.here(index)
        cfg, line = settled(cfg, device)
        if line:
            say(line)
        require_optimizer(cfg.optim.name)
        accelerator = make_accelerator(cfg, device)
        for remark in remarks(Processes.of(accelerator).gathered(seen(device, index))):
            say(remark)
        with Tracker(run.metrics, accelerator) as tracker:
            return _run(cfg, run, steps, accelerator, tracker, stop)
    except Exception as error:
        if stop.requested and is_lost_process(error):  # the signal has found the others between two steps
            raise Stopped("stopped by a signal; the same command goes on") from None
        raise
    finally:
        stop.restore()


def _run(
    cfg: Any, run: Run, steps: Steps[Any, Any, Any], accelerator: Accelerator, tracker: Tracker, stop: StopSignal
) -> dict[str, Any]:
    context = Context(cfg, run.dir, accelerator.num_processes, accelerator.is_main_process, accelerator.device, stop.check)
    processes = Processes.of(accelerator)
    alone = processes.count == 1
    with stop.at_once(alone):  # nothing is lost by leaving before the first step
        prepared = processes.in_turn(lambda: steps.prepare(context))
        agree_on(processes, prepared.identity | {"data.order": order_hash(prepared.order)})
        history = open_history(cfg, run, prepared, processes)
        say(headline(cfg, prepared.num_steps, prepared.lr, str(context.device), processes.count))
        for line in prepared.lines:
            say(line)
        tracker.begin(cfg.tracker, cfg.track, run.config, history.first_step)
        cfg = _with_rate(cfg, prepared)
        _warmup_steps(cfg, prepared.num_steps)
        context = replace(context, cfg=cfg)
        built = steps.build(context, prepared, accelerator)
        for line in in_words(built.module):
            say(line)
        module, optimizer = _prepare_module(cfg, run, built, accelerator, history.checkpoint)
        session = Session(module, accelerator, run, history.state, tracker)
        with built.as_given():
            training = steps.training(context, prepared, built, session)
            history.hold("references", training.references)
            loop = _loop(context, run, prepared, training, session, optimizer, stop)
            start = _begin(loop, history, training, stop)
            session.tracker.page = LivePage.begun(run.dir, prepared.num_steps, start) if context.main else None
    with products_beside_autocast(accelerator.mixed_precision, accelerator.device):
        loop.fit(start)
    with stop.at_once(alone):
        done = loop.state.ended["step"] if loop.state.ended else prepared.num_steps
        measured = _measure(training, done, stop)
        tracker.log(done, measured.metrics)
    steps_kept = loop.state.ended["back_to"] if loop.state.ended else prepared.num_steps
    before = loop.state.before
    metrics = measured.metrics | {f"{name}_before": value for name, value in before.items()}
    compared = training.compare(before, measured.metrics) | change_bounds(loop.state.before_rows, measured.rows)
    outcome = Outcome(loop.state, steps_kept, measured, metrics | compared)
    if training.data is not None:
        prepared = replace(prepared, data=training.data)
    record = steps.save(context, prepared, built, outcome, accelerator)
    return _finish(cfg, run, record | common_record(cfg, outcome, accelerator), session)


def _with_rate(cfg: Any, prepared: Prepared[Any]) -> Any:
    """With `optim.lr` a number."""
    if cfg.optim.lr != "auto":
        return cfg
    if prepared.lr is None:
        raise of_all(UserError(f"optim.lr: auto is a rule of language models, which {cfg.stage} does not train; give a number"))
    if cfg.optim.min_lr > prepared.lr:
        raise of_all(UserError(f"optim.min_lr: {cfg.optim.min_lr:g} is above the rate that optim.lr=auto found, {prepared.lr:g}"))
    return cfg.model_copy(update={"optim": cfg.optim.model_copy(update={"lr": prepared.lr})})


def _warmup_steps(cfg: Any, num_steps: int) -> int:
    """Raises UserError where they are all there are."""
    steps = cfg.optim.warmup_steps
    if steps is None:
        return math.ceil(cfg.optim.warmup_ratio * num_steps)
    if steps and steps >= num_steps:
        raise of_all(UserError(f"optim.warmup_steps: {steps} leave none of the run's {num_steps} steps; give fewer"))
    return steps


def _prepare_module(
    cfg: Any, run: Run, built: Trainable[Any], accelerator: Accelerator, checkpoint: Checkpoint | None
) -> tuple[nn.Module, Any]:
    """The module and its optimizer, wrapped by accelerate; sharded before the optimizer sees it."""
    optim, module = cfg.optim, built.module
    if cfg.train.fsdp:
        bf16, wide = accelerator.mixed_precision == "bf16", cfg.base_dtype == "float32"
        module = shard(module, built.module.units, accelerator.device, bf16, wide)  # pyright: ignore
    optimizer, note = make_optimizer(
        optim.name,
        module,
        group_rates(module, cfg.peft.rate_of, optim.lr, optim.lr_groups),
        lr=optim.lr,
        betas=optim.betas,
        eps=optim.eps,
        weight_decay=optim.weight_decay,
        options=optim.options,
        kept=Processes.of(accelerator).told(lambda: checkpoint.moments) if checkpoint else None,
    )
    if note:
        say(note)
    Processes.of(accelerator).told(lambda: check_room(run.checkpoints, module, optim.name))
    if accelerator.num_processes > 1 and not cfg.train.fsdp:
        begin_alike(module)
    # as it is for evaluation: in its precision, and not in DistributedDataParallel (see training/gradients.py)
    wrapped = accelerator.prepare_model(module, evaluation_mode=True)
    return wrapped, accelerator.prepare_optimizer(optimizer)


def _loop(
    context: Context,
    run: Run,
    prepared: Prepared[Any],
    training: Training[Any],
    session: Session,
    optimizer: Any,
    stop: StopSignal,
) -> Loop[Any]:
    cfg = context.cfg
    if computes_in_float16(cfg):
        loss_scale.begin(session.state)
    config = LoopConfig(
        num_steps=prepared.num_steps,
        warmup_steps=_warmup_steps(cfg, prepared.num_steps),
        log_steps=cfg.train.log_steps,
        eval_steps=cfg.train.eval_steps,
        save_steps=cfg.train.save_steps,
        keep_checkpoints=cfg.train.keep_checkpoints,
        lr=cfg.optim.lr,
        schedule=cfg.optim.schedule,
        max_grad_norm=cfg.optim.max_grad_norm,
        seed=cfg.train.seed,
        min_lr=cfg.optim.min_lr,
        decay_steps=round(cfg.optim.decay_ratio * prepared.num_steps),
    )
    return Loop(
        name=cfg.stage,
        accelerator=session.accelerator,
        module=session.module,
        optimizer=optimizer,
        loss=training.loss,
        source=training.updates,
        config=config,
        tracker=session.tracker,
        checkpoints=run.checkpoints,
        stop=stop,
        stop_after=cfg.run.stop_after,
        saving=run.mirror.saving if run.mirror else nullcontext,
        guard=GuardConfig(cfg.train.skip_nonfinite, cfg.train.spike_mads, cfg.train.spike_steps),
        unit=training.unit,
        where=prepared.where,
        evaluate=lambda done: training.measure(done, lambda: None).metrics,
        callback=training.callback,
        checkpoint_gate=training.checkpoint_gate,
        state=session.state,
        judge=_judge(cfg.train),
    )


def _judge(train: TrainConfig) -> Judge | None:
    """None where evaluations are not compared."""
    if (metric := train.judged_by) is None:
        return None
    stopping = train.early_stopping
    lower = stopping.direction == "lower" or (stopping.direction == "auto" and direction(metric) < 0)
    return Judge(metric, lower, stopping.patience, bool(train.keep_best))


def _begin(loop: Loop[Any], history: History, training: Training[Any], stop: StopSignal) -> int:
    """The step to go on from. A fresh run is measured first; a resumed one is put back as it was."""
    checkpoint = history.checkpoint
    if checkpoint is None:
        before = training.measure(0, stop.check)
        if loop.judge:
            loop.judge.check(before.metrics)
        before = before | training.measure_around(False)
        loop.tracker.rewind(-1)
        loop.tracker.log(0, before.metrics)
        loop.state.before, loop.state.before_rows = before.metrics, losses_of(before.rows)
        return 0
    loop.restore(checkpoint)
    loop.tracker.rewind(checkpoint.step, loop.state.lines)
    say(f"going on from step {checkpoint.step} of {loop.config.num_steps} ({checkpoint.path.name})")
    return checkpoint.step


def _measure(training: Training[Any], done: int, stop: StopSignal) -> Measured:
    """What the result is worth."""
    return training.measure(done, stop.check) | training.measure_around(True)


def _finish(cfg: Any, run: Run, record: dict[str, Any], session: Session) -> dict[str, Any]:
    def finish() -> dict[str, Any]:
        finished = run.finish(record | session.tracker.record())
        write_card(run.dir)
        page = run_page(run.dir)
        show_outcome(run, finished, page)
        if cfg.track.artifacts:
            session.tracker.keep([*finished.files, MANIFEST, page.name])
        return finished.to_dict()

    manifest = session.processes.told(finish)
    session.accelerator.end_training()
    return manifest
