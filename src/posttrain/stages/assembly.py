"""What the language stages share: everything between a config and a finished run, but for the objective."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from torch import nn

from posttrain.after.measure import EvalSet, Rows, Task, eval_batches, own_metrics, remember, set_metrics
from posttrain.after.report import run_page
from posttrain.batch import LossOutput, PackedBatch
from posttrain.cache import cache_root
from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.data.conversations import Encoder, chat_template
from posttrain.data.packing import Order, silent
from posttrain.data.prepare import prepare, prepare_set
from posttrain.errors import UserError
from posttrain.models.adapters import lr_ratio
from posttrain.models.causal import load_tokenizer, stop_tokens
from posttrain.models.scorer import padding_apart
from posttrain.rundir import Run, write_json
from posttrain.signals import StopSignal
from posttrain.stages.build import Built, Inputs, build_model, save_result
from posttrain.stages.outcome import manifest_of, show_outcome
from posttrain.stages.reference import attach, reference_logps, train_reference
from posttrain.stages.start import find_base, merged_start, resolve_start
from posttrain.train.checkpoint import newest_checkpoint, restore
from posttrain.train.loop import Loop, Plan, Update
from posttrain.train.optim import make_optimizer
from posttrain.train.tracking import Tracker


def run_stage(cfg: LanguageStage, run: Run, task: Task, kind: type[StageRun] | None = None) -> dict[str, Any]:
    """Train to the end, or go on where a checkpoint left off; returns the manifest. kind: what does otherwise than `StageRun`.

    All that can be refused is refused before a weight is loaded. Raises UserError, RunError or Stopped.
    """
    stop = StopSignal()
    try:
        return (kind or StageRun)(cfg, run, task, _accelerator(cfg, run), stop).go()
    finally:
        stop.restore()


@dataclass
class StageRun:
    """One run of one stage: the steps of `go`, and what they share."""

    cfg: LanguageStage
    run: Run
    task: Task
    accelerator: Accelerator
    stop: StopSignal
    rows: Rows = field(default_factory=dict)  # of the newest evaluation
    loop: Loop | None = None

    def go(self) -> dict[str, Any]:
        with self.accelerator.main_process_first():  # the others find data and models in the cache
            inputs = read_inputs(self.cfg, self.accelerator.num_processes)
        self.check(inputs)
        _announce(self.cfg, self.run, inputs)
        tracker = Tracker(self.run.metrics, self.accelerator, self.cfg.tracker, self.run.config)
        built = build_model(
            self.cfg, inputs.start, inputs.base, inputs.order.num_steps, self.accelerator.device, self.task.scores
        )
        whole, built = self.assemble(built, inputs)
        say(f"training {built.trained:,} of {built.total:,} numbers ({built.trained / built.total:.2%})")
        optim = self.cfg.optim
        optimizer, note = make_optimizer(
            optim.name,
            whole,
            partial(lr_ratio, self.cfg.peft),
            lr=optim.lr,
            betas=optim.betas,
            eps=optim.eps,
            weight_decay=optim.weight_decay,
        )
        if note:
            say(note)
        module, optimizer = self.accelerator.prepare(whole, optimizer)
        with self._as_given(built, inputs):
            held_out, table = self.references(module, inputs)
        self.loop = loop = self._loop(module, optimizer, inputs, held_out, table, tracker)
        loop.method = built.schedule
        with self._as_given(built, inputs):
            start = self._begin(loop, module, optimizer, inputs, held_out)
        loop.fit(start)
        after = self._measure(module, inputs, held_out, inputs.order.num_steps, identity=None)
        tracker.log(inputs.order.num_steps, after)
        return self._finish(built, inputs, loop.state, after)

    def _as_given(self, built: Built, inputs: Inputs) -> AbstractContextManager[None]:
        """Before training the model is what the stage was given: without soft tokens that are still random."""
        return nullcontext() if inputs.start.mode == "continue" else built.module.without_prompt()

    def check(self, inputs: Inputs) -> None:
        """Refuse, before a weight is loaded, what this stage cannot do. Raises UserError."""

    def assemble(self, built: Built, inputs: Inputs) -> tuple[nn.Module, Built]:
        """The module that is trained, around `built.module`, which is what the run leaves."""
        return built.module, built

    def updates(self, step: int, module: nn.Module, inputs: Inputs, table: Any) -> Iterator[Update]:
        """What step `step` of the run trains on. table: of the training references, where the task needs them."""
        batches = []
        for units in inputs.order.micro(step, self.accelerator.process_index):
            drawn = units or [0]
            batch = self.task.pack(inputs.data.train, drawn)
            batch = attach(batch, table[drawn].reshape(-1)) if table is not None else batch
            batches.append(batch if units else silent(batch))
        yield Update(batches)

    def objective(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        """The loss of one micro-batch."""
        return self.task.objective(module, batch)

    def measure(
        self, module: nn.Module, inputs: Inputs, held_out: list[PackedBatch], done: int, check: Callable[[], None]
    ) -> dict[str, float]:
        """The stage's own held-out figures after `done` steps."""
        found, self.rows = own_metrics(module, held_out, self.task, self.accelerator.device, check)
        return found

    def remarks(self) -> dict[str, Any]:
        """What the manifest says of this stage alone."""
        return {}

    def references(self, module: nn.Module, inputs: Inputs) -> tuple[list[PackedBatch], Any]:
        """Held-out batches, and the table of training references; both before any checkpoint is loaded."""
        held_out = eval_batches(self.task, inputs.data.held_out)
        if not self.task.needs_reference:
            return held_out, None
        device, order = self.accelerator.device, inputs.order
        layout = [order.batch_size, order.grad_accum, order.world_size, order.seed, min(order.total_units, order.num_units)]
        key = _hash(self._identity(inputs), inputs.data.key, layout, str(device))
        path = cache_root() / "reference" / f"{key}.safetensors"
        table = train_reference(module, inputs.data.train, order, self.accelerator, path, self.stop.check)
        return [attach(batch, reference_logps(module, batch, device)) for batch in held_out], table

    def _loop(
        self, module: nn.Module, optimizer: Any, inputs: Inputs, held_out: list[PackedBatch], table: Any, tracker: Tracker
    ) -> Loop:
        cfg, order = self.cfg, inputs.order
        plan = Plan(
            num_steps=order.num_steps,
            warmup_steps=math.ceil(cfg.optim.warmup_ratio * order.num_steps),
            log_steps=cfg.train.log_steps,
            eval_steps=cfg.train.eval_steps,
            save_steps=cfg.train.save_steps,
            keep_checkpoints=cfg.train.keep_checkpoints,
            lr=cfg.optim.lr,
            schedule=cfg.optim.schedule,
            max_grad_norm=cfg.optim.max_grad_norm,
            seed=cfg.train.seed,
        )
        return Loop(
            name=cfg.stage,  # type: ignore[attr-defined]
            accelerator=self.accelerator,
            module=module,
            optimizer=optimizer,
            objective=self.objective,
            source=lambda step: self.updates(step, module, inputs, table),
            plan=plan,
            tracker=tracker,
            checkpoints=self.run.checkpoints,
            stop=self.stop,
            evaluate=lambda done: self.measure(module, inputs, held_out, done, lambda: None),
        )

    def _begin(self, loop: Loop, module: nn.Module, optimizer: Any, inputs: Inputs, held_out: list[PackedBatch]) -> int:
        """The step to go on from. A fresh run is measured first; a resumed one is put back as it was."""
        checkpoint, damaged = newest_checkpoint(self.run.checkpoints)
        for line in damaged:
            say(f"{line}; going on from the newest good one")
        if checkpoint is None:
            before = self._measure(module, inputs, held_out, 0, self._identity(inputs))
            loop.tracker.rewind(-1)
            loop.tracker.log(0, before)
            loop.state = {"before": before, "data": inputs.data.key}
            return 0
        if checkpoint.state["data"] != inputs.data.key:
            raise UserError(
                f"data.path: the data is not what {self.run.dir} began with; give another run.dir to train on the new rows"
            )
        restore(checkpoint, self.accelerator.unwrap_model(module), _inner(optimizer))
        if loop.method:
            loop.method.load(checkpoint.method)
        loop.state = checkpoint.state
        loop.tracker.rewind(checkpoint.step)
        say(f"going on from step {checkpoint.step} of {inputs.order.num_steps} ({checkpoint.path.name})")
        return checkpoint.step

    def _measure(
        self, module: nn.Module, inputs: Inputs, held_out: list[PackedBatch], done: int, identity: str | None
    ) -> dict[str, float]:
        device = self.accelerator.device
        own = self.measure(module, inputs, held_out, done, self.stop.check)
        return own | set_metrics(module, inputs.sets, identity, cache_root(), device, self.stop.check)

    def _identity(self, inputs: Inputs, base: str | None = None, adapter: str | None = None) -> str:
        """Names a function: base weights, what an adapter adds, and the precision in which both are computed."""
        cfg = self.cfg
        weights = [base or inputs.base.digest, inputs.start.identity if adapter is None else adapter]
        return _hash(weights, cfg.quant.model_dump(), cfg.model.dtype, cfg.peft.saves == "model", cfg.model.attention)

    def _finish(self, built: Built, inputs: Inputs, state: dict[str, Any], after: dict[str, float]) -> dict[str, Any]:
        if self.task.scores:
            padding_apart(inputs.tokenizer, inputs.ends)
        result = save_result(self.cfg, self.run, built, self.accelerator, inputs)
        metrics = after | {f"{name}_before": value for name, value in state["before"].items()}
        if "general/loss" in after:
            start = state["before"]["general/loss"]
            metrics["forgetting/percent"] = 100 * (after["general/loss"] - start) / start
        manifest: dict[str, Any] = {}
        if self.accelerator.is_main_process:
            if self.rows:
                write_json(self.run.dir / "held_out.json", self.rows)
            remember(inputs.sets, after, self._identity(inputs, result.base_digest, result.adapter_digest), cache_root())
            said = manifest_of(self.cfg, built, inputs, result.kind, state, metrics, self.accelerator)
            manifest = self.run.finish(said | self.remarks())
            show_outcome(self.run, manifest, run_page(self.run.dir))
        self.accelerator.wait_for_everyone()
        self.accelerator.end_training()
        return manifest


def read_inputs(cfg: LanguageStage, world_size: int) -> Inputs:
    """Base, tokenizer and tokenised data: everything a mistake of the user can be in."""
    start, model = resolve_start(cfg), cfg.model
    base = find_base(start, model.revision)
    template = chat_template(model.chat_template) if model.chat_template else None
    tokenizer = load_tokenizer(start.tokenizer, base.revision, model.trust_remote_code, template)
    encoder = Encoder(tokenizer, stop_tokens(start.source, model.revision, tokenizer))
    train = cfg.train
    data = prepare(cfg.data, cfg.stage, encoder, cfg.example_length, cache_root())  # type: ignore[attr-defined]
    sets = [
        EvalSet(name, *prepare_set(path, cfg.eval.rows, encoder, cfg.eval.max_length))
        for name, path in (cfg.eval.sets or {}).items()
    ]
    per_step = train.batch_size * train.grad_accum * world_size
    total = train.max_steps * per_step if train.max_steps else math.ceil(train.epochs * len(data.train))
    order = Order(len(data.train), train.batch_size, train.grad_accum, world_size, train.seed, total)
    start, base = merged_start(cfg, start, base)
    return Inputs(start, base, tokenizer, encoder.identity, encoder.end_tokens(), data, sets, order)


def _announce(cfg: LanguageStage, run: Run, inputs: Inputs) -> None:
    """What is about to happen, in the user's words: model, data, and what became of its rows."""
    order, account = inputs.order, inputs.data.account
    if inputs.start.mode:
        how = {"stack": "a new one on top", "continue": "trained on", "merge": "merged into it"}[inputs.start.mode]
        say(f"model {inputs.base.name} with the adapter of {cfg.init}, {how} (chain.mode={inputs.start.mode})")
    else:
        say(f"model {inputs.base.name}")
    samples = account.trained_tokens == 0  # the rows are prompts, the stage writes what it trains on
    counted = "" if samples else f", {account.tokens:,} tokens, {account.trained_tokens:,} trained"
    say(
        f"data {account.source}: {account.rows:,} rows of shape {account.shape}{counted}; "
        f"{inputs.data.held_out_account.rows} rows held out"
    )
    too_long = f"rows left out, their prompts are longer than {cfg.example_length} tokens"
    for count, what in (
        (account.untrained, too_long if samples else "rows left out, no token of theirs would count"),
        (account.truncated, f"rows cut to train.max_length={cfg.train.max_length}"),
        (account.border_tokens, "tokens lie across a prompt's border and do not count"),
    ):
        if count:
            say(f"  {count:,} {what}")
    say(f"{order.num_steps} steps of {order.units_per_step} {'prompts' if samples else 'sequences'} -> {run.dir}")


def _accelerator(cfg: LanguageStage, run: Run) -> Accelerator:
    """With FSDP2 where the config, or accelerate's own, asks for it. UserError for a tracker that is not installed."""
    if cfg.tracker != "none" and find_spec(cfg.tracker) is None:
        raise UserError(f"tracker: {cfg.tracker} is not installed; pip install 'posttrain[{cfg.tracker}]'")
    fsdp = FullyShardedDataParallelPlugin(fsdp_version=2, auto_wrap_policy="transformer_based_wrap") if cfg.train.fsdp else None
    log_with = None if cfg.tracker == "none" else cfg.tracker
    accelerator = Accelerator(mixed_precision=_precision(cfg), log_with=log_with, project_dir=run.dir, fsdp_plugin=fsdp)
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin: Any = accelerator.state.fsdp_plugin
        if plugin.fsdp_version != 2:
            raise UserError("train.fsdp: accelerate's config asks for FSDP version 1; set fsdp_version: 2 there")
        if not cfg.train.fsdp:
            raise UserError("train.fsdp: accelerate's config asks for FSDP; say train.fsdp=true too")
        plugin.cpu_ram_efficient_loading = False  # every process has read the weights
    return accelerator


def _precision(cfg: LanguageStage) -> str:
    """Autocast, for accelerate: only where the weights are float32 and the device does bfloat16 faster."""
    if cfg.train.precision != "auto":
        return {"none": "no", "bf16": "bf16"}[cfg.train.precision]
    full_precision = cfg.model.dtype == "float32" or (cfg.model.dtype == "auto" and cfg.peft.saves == "model")
    return "bf16" if full_precision and torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"


def _hash(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]


def _inner(optimizer: Any) -> Any:
    """The optimizer inside accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)
