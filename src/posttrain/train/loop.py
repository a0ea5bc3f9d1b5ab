"""The one training loop. It owns time; what is computed comes in as an objective, what is read as a source of batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar, cast

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain.batch import Batch, LossOutput, Metrics
from posttrain.console import Meter
from posttrain.errors import RunError, Stopped
from posttrain.signals import StopSignal
from posttrain.tensors import whole
from posttrain.train.checkpoint import Checkpoint, restore, save_checkpoint
from posttrain.train.optim import Schedule, lr_factor
from posttrain.train.tracking import Tracker

B = TypeVar("B", bound=Batch)
Objective = Callable[[nn.Module, B], LossOutput]


@dataclass(frozen=True)
class Update(Generic[B]):
    """One step of the optimizer: this process's micro-batches (none: no step), and figures as in `LossOutput`."""

    batches: list[B]
    metrics: Metrics = field(default_factory=dict)


Source = Callable[
    [int], Iterable[Update[B]]
]  # step of the run (from 0) -> its updates: one, or in PPO as many as a rollout feeds


@dataclass(frozen=True)
class Plan:
    """When things happen, in steps of the run."""

    num_steps: int
    warmup_steps: int
    log_steps: int
    eval_steps: int | None
    save_steps: int | None
    keep_checkpoints: int
    lr: float
    schedule: Schedule
    max_grad_norm: float | None
    seed: int


class StepMethod(Protocol):
    """What a method has to do in every optimizer step, and its state for checkpoints."""

    def penalty(self) -> Tensor: ...  # added to the step's mean loss

    def after_step(self, done: int) -> None: ...  # after step number `done` (from 1), before the gradients are cleared

    def state(self) -> dict[str, Tensor]: ...

    def load(self, state: dict[str, Tensor]) -> None: ...


def total_over(accelerator: Accelerator, values: Tensor) -> Tensor:
    """The sum of `values` over all processes."""
    return cast(Tensor, accelerator.reduce(values.to(accelerator.device), "sum"))


class Averages:
    """Sums and counts by name, on the device until they are read."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.counts: dict[str, float] = {}

    def add(self, metrics: Metrics, share: float = 1.0) -> None:
        for name, (total, count) in metrics.items():
            part = share * total.detach()
            self.sums[name] = self.sums[name] + part if name in self.sums else part
            self.counts[name] = self.counts.get(name, 0.0) + share * count

    def read(self, accelerator: Accelerator | None = None) -> dict[str, float]:
        """Averages, over all processes when an accelerator is given; everything starts anew."""
        names = sorted(self.sums)
        device = self.sums[names[0]].device if names else torch.device("cpu")
        totals = torch.stack([self.sums[n].float() for n in names] + [torch.tensor(self.counts[n], device=device) for n in names])
        if accelerator is not None and accelerator.num_processes > 1:
            totals = total_over(accelerator, totals)
        values = totals.tolist()
        self.sums, self.counts = {}, {}
        return {n: values[i] / max(values[i + len(names)], 1e-12) for i, n in enumerate(names)}


@dataclass
class Loop(Generic[B]):
    """Runs steps `start`..plan.num_steps. `state` holds what a checkpoint keeps beside the weights."""

    name: str
    accelerator: Accelerator
    module: nn.Module
    optimizer: Optimizer
    objective: Objective[B]
    source: Source[B]
    plan: Plan
    tracker: Tracker
    checkpoints: Path
    stop: StopSignal
    evaluate: Callable[[int], dict[str, float]]  # after so many steps
    stop_after: int | None = None  # steps of this start
    unit: str = "tokens"  # what the size of a batch counts
    method: StepMethod | None = None
    state: dict[str, Any] = field(default_factory=dict)

    def fit(self, start: int) -> None:
        """Raises Stopped after a signal, with a checkpoint written; RunError on a loss or gradient that is not finite."""
        self._last = start + self.stop_after if self.stop_after else None
        window, began, window_tokens = Averages(), time.monotonic(), 0
        with Meter(self.name, self.plan.num_steps, start) as meter:
            for step in range(start, self.plan.num_steps):
                stepped = time.monotonic()
                norm, tokens = self._step(step, window)
                done = step + 1
                self.state[self.unit] = self.state.get(self.unit, 0) + tokens
                self.state["seconds"] = self.state.get("seconds", 0.0) + time.monotonic() - stepped
                window_tokens += tokens
                if done % self.plan.log_steps == 0 or done == self.plan.num_steps:
                    values = self._log(done, window.read(self.accelerator), norm, window_tokens / (time.monotonic() - began))
                    began, window_tokens = time.monotonic(), 0
                    meter.advance(_note(values, self.unit))
                else:
                    meter.advance()
                self._boundary(done)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimizer and method as they were. Raises UserError when they do not fit."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
        restore(checkpoint, self.accelerator.unwrap_model(self.module), optimizer)
        if self.method:
            self.method.load(checkpoint.method)

    def _step(self, step: int, window: Averages) -> tuple[float, int]:
        """All updates of a step: the last one's gradient norm, and how many tokens they took."""
        norm, tokens, parts = 0.0, 0, 0
        for update in self.source(step):
            window.add(update.metrics)
            if not update.batches:
                continue
            norm, seen = self._update(step, parts, update.batches, window)
            tokens, parts = tokens + seen, parts + len(update.batches)
        return norm, tokens

    def _update(self, step: int, parts: int, batches: list[B], window: Averages) -> tuple[float, int]:
        """parts: how many micro-batches of the step came before."""
        self.module.train()
        count, tokens = self._totals(batches)
        scale = self.accelerator.num_processes / count  # processes' gradients are averaged, sums are wanted
        for i, batch in enumerate(batches, parts):
            seed_step(self.plan.seed, step, i * self.accelerator.num_processes + self.accelerator.process_index)
            last = i == parts + len(batches) - 1
            with self.accelerator.no_sync(self.module) if not last else nullcontext():
                output = self.objective(self.module, batch.to(self.accelerator.device))
                share = 1.0 if batch.count else 0.0  # a silent batch
                self.accelerator.backward(output.total * (scale * share))
            window.add(output.metrics, share)
        if self.method:
            self._add_penalty(self.method.penalty())
        clip = self.plan.max_grad_norm or math.inf
        norm = float(whole(cast(Tensor, self.accelerator.clip_grad_norm_(self.module.parameters(), clip))))
        if not math.isfinite(norm):
            rows = [row for batch in batches for row in batch.rows]
            raise RunError(f"step {step + 1}: loss or gradient is not finite; no step was taken. Rows of the batch: {rows[:32]}")
        for group in self.optimizer.param_groups:
            group["lr"] = self._lr(step) * group["lr_ratio"]
        self.optimizer.step()
        if self.method:
            self.method.after_step(step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, tokens

    def _lr(self, step: int) -> float:
        return self.plan.lr * lr_factor(self.plan.schedule, step, self.plan.num_steps, self.plan.warmup_steps)

    def _add_penalty(self, penalty: Tensor) -> None:
        """To the gradients that all processes have in common by now: it depends on the weights alone."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        for p, grad in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
            if grad is not None and p.grad is not None:
                p.grad += grad

    def _totals(self, batches: list[B]) -> tuple[float, int]:
        """Count and tokens of the whole optimizer step, over all processes."""
        own = [sum(b.count for b in batches), float(sum(b.size for b in batches if b.count))]
        if self.accelerator.num_processes > 1:
            own = total_over(self.accelerator, torch.tensor(own, dtype=torch.float64)).tolist()
        return own[0], int(own[1])

    def _log(self, step: int, averages: dict[str, float], norm: float, rate: float) -> dict[str, float]:
        values = {self.unit: self.state[self.unit]} | {f"train/{name}": value for name, value in averages.items()}
        values |= {"train/grad_norm": norm, "train/lr": self._lr(step - 1), f"train/{self.unit}_per_second": rate}
        self.tracker.log(step, values)
        return values

    def _boundary(self, done: int) -> None:
        """Between two steps: evaluate, save, or leave."""
        plan, last = self.plan, done == self.plan.num_steps
        stopping = self._stop_requested() or done == self._last
        if plan.eval_steps and done % plan.eval_steps == 0 and not last and not stopping:
            self.tracker.log(done, self.evaluate(done))
        if stopping or last or (plan.save_steps and done % plan.save_steps == 0):
            writer = self.accelerator.is_main_process
            method = self.method.state() if self.method else {}
            save_checkpoint(
                self.checkpoints, done, self.module, self.optimizer, method, self.state,
                keep=plan.keep_checkpoints, is_writer=writer,
            )  # fmt: skip
            self.accelerator.wait_for_everyone()
        if stopping and not last:
            why = "as run.stop_after says" if done == self._last else "by a signal"
            raise Stopped(f"stopped {why} after step {done} of {plan.num_steps}, saved; the same command goes on")

    def _stop_requested(self) -> bool:
        if self.accelerator.num_processes == 1:
            return self.stop.requested
        return bool(total_over(self.accelerator, torch.tensor(float(self.stop.requested))).item() > 0)


def evaluate(
    module: nn.Module, batches: list[B], objective: Objective[B], device: torch.device, each: Callable[[], None]
) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Averages of the objective's metrics over `batches`, and its values for each unit, without gradients.

    Every process computes all of them. `each` is called after every batch, and may raise to leave.
    """
    module.eval()
    found, rows = Averages(), dict[str, list[Tensor]]()
    with torch.no_grad():
        for batch in batches:
            output = objective(module, batch.to(device))
            found.add(output.metrics)
            for name, values in output.rows.items():
                rows.setdefault(name, []).append(values.cpu())
            each()
    return found.read(), {name: torch.cat(values) for name, values in rows.items()}


def seed_step(seed: int, step: int, part: int) -> None:
    """All randomness of a step is a function of the run's seed and the step's number: there is no state to save or lose."""
    torch.manual_seed((seed * 1_000_003 + step) * 8191 + part)


def _note(values: dict[str, float], unit: str) -> str:
    rate = values[f"train/{unit}_per_second"]
    note = f"loss {values['train/loss']:.4f}  {rate:.3g} {unit}/s"
    if "train/reward" in values:
        note += f"  reward {values['train/reward']:.3f}  kl {values['train/kl']:.3f}"
    return note + (f"  accuracy {values['train/accuracy']:.0%}" if "train/accuracy" in values else "")
