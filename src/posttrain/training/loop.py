"""The one training loop. It owns time; what is computed comes in as an objective, what is read as a source of batches."""

from __future__ import annotations

import hashlib
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain.batch import Metrics
from posttrain.console import Meter, say
from posttrain.errors import Stopped
from posttrain.runs.files import write_json
from posttrain.tensors import whole
from posttrain.training.checkpoint import Checkpoint, newest_checkpoint, restore, save_checkpoint
from posttrain.training.guard import LEFT_OUT, GuardConfig, Spike, check_update, halved, is_out_of_memory, not_finite
from posttrain.training.objective import Averages, B, Objective, Plan, Source, StepCallback, total_over
from posttrain.training.optimizer import lr_factor
from posttrain.training.signals import StopSignal
from posttrain.training.tracking import Tracker


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
    method: StepCallback | None = None
    checkpoint_gate: Callable[[int], bool] | None = (
        None  # asked before a checkpoint is kept; if not, the run ends with the one before
    )
    guard: GuardConfig = field(default_factory=GuardConfig)
    where: Callable[[int], str] = str  # what the number of a row is called
    state: dict[str, Any] = field(default_factory=dict)
    window: Averages = field(default_factory=Averages)  # since the last logged step

    def fit(self, start: int) -> None:
        """Raises Stopped after a signal, with a checkpoint written; RunError on a loss or gradient that is not finite."""
        self._last = start + self.stop_after if self.stop_after else None
        self.window.load(self.state.pop("window", {}))
        if self.state.pop("owed", False):
            self._evaluate(start)
        if (self.guard.spike_mads is not None or self.checkpoint_gate) and not start:
            self._save(start)  # what the first spike, or an end before the first checkpoint, can go back to
        began, window_tokens = time.monotonic(), 0
        with Meter(self.name, self.plan.num_steps, start) as meter:
            for step in range(start, self.plan.num_steps):
                stepped = time.monotonic()
                norm, tokens = self._step(step)
                done = step + 1
                self.state[self.unit] = self.state.get(self.unit, 0) + tokens
                self.state["seconds"] = self.state.get("seconds", 0.0) + time.monotonic() - stepped
                window_tokens += tokens
                if done % self.plan.log_steps == 0 or done == self.plan.num_steps:
                    values = self._log(done, self.window.read(self.accelerator), norm, window_tokens / (time.monotonic() - began))
                    began, window_tokens = time.monotonic(), 0
                    meter.advance(_note(values, self.unit))
                else:
                    meter.advance()
                self._boundary(done)
                if "ended" in self.state:
                    break

    def restore(self, checkpoint: Checkpoint) -> None:
        """Weights, optimizer and method as they were. Raises UserError when they do not fit."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)  # inside accelerate's wrapper
        restore(checkpoint, self.accelerator.unwrap_model(self.module), optimizer)
        if self.method:
            self.method.load(checkpoint.method)

    def _step(self, step: int) -> tuple[float, int]:
        """All updates of a step: the last one's gradient norm, and how many tokens they took."""
        norm, tokens, parts = 0.0, 0, 0
        try:
            with self.stop.at_once(self.accelerator.num_processes == 1):  # a rollout can be long, and is made again
                updates = iter(self.source(step))
                update = next(updates, None)
        except Stopped:
            self._save(step)
            raise Stopped(
                f"stopped by a signal after step {step} of {self.plan.num_steps}, saved; the same command goes on"
            ) from None
        try:
            while update is not None:
                self.window.add(update.metrics)
                if update.batches:
                    norm, seen, parts = self._update(step, parts, update.batches)
                    tokens += seen
                update = next(updates, None)
        except Spike as spike:
            self._go_back(spike)
        return norm, tokens

    def _update(self, step: int, parts: int, batches: list[B]) -> tuple[float, int, int]:
        """parts: how many micro-batches of the step came before. Returns gradient norm, tokens, and parts after it."""
        self.module.train()
        count, tokens = self._totals(batches)
        rows = [row for batch in batches for row in batch.rows]
        self._remember(rows)
        loss, metrics, parts = self._gradients(step, parts, batches, count)
        if self.method:
            penalty = self.method.penalty()
            self.window.add({"penalty": (penalty, 1.0)})
            self._add_penalty(penalty)
        clip = self.plan.max_grad_norm or math.inf
        norm = whole(cast(Tensor, self.accelerator.clip_grad_norm_(self.module.parameters(), clip)))
        loss, norm = self._read(loss, norm)
        if self._is_fit(step + 1, loss, norm, rows):
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(step) * group["lr_ratio"]
            self.optimizer.step()
            for each, share in metrics:
                self.window.add(each, share)
            if self.method:
                self.method.after_step(step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return norm, tokens, parts

    def _gradients(
        self, step: int, parts: int, batches: list[B], count: float
    ) -> tuple[Tensor, list[tuple[Metrics, float]], int]:
        """Of the whole update, in micro-batches that memory has room for; with this process's part of the mean loss."""
        for _ in self.state.setdefault("halved", []):
            batches = halved(batches)
        while True:
            try:
                return self._backward(step, parts, batches, count)
            except Exception as error:
                smaller = halved(batches)
                if not is_out_of_memory(error) or self.accelerator.num_processes > 1 or len(smaller) == len(batches):
                    raise
            # outside of the handler, where nothing holds what the failed pass has kept
            self.optimizer.zero_grad(set_to_none=True)
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            batches = smaller
            self.state["halved"].append(step + 1)
            times = 2 ** len(self.state["halved"])
            say(f"step {step + 1}: out of memory; from here on micro-batches are 1/{times} as large, and {times} times as many")

    def _backward(self, step: int, parts: int, batches: list[B], count: float) -> tuple[Tensor, list[tuple[Metrics, float]], int]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        scale = processes / count  # processes' gradients are averaged, sums are wanted
        total, metrics = torch.zeros((), device=self.accelerator.device), []
        for i, batch in enumerate(batches, parts):
            seed_step(self.plan.seed, step, i * processes + rank)
            last = i == parts + len(batches) - 1
            with self.accelerator.no_sync(self.module) if not last else nullcontext():
                output = self.objective(self.module, batch.to(self.accelerator.device))
                share = 1.0 if batch.loss_denominator else 0.0  # a silent batch
                self.accelerator.backward(output.total * (scale * share))
            total += output.total.detach() * (share / count)
            metrics.append((output.metrics, share))
        return total, metrics, parts + len(batches)

    def _read(self, loss: Tensor, norm: Tensor) -> tuple[float, float]:
        """The only place of a step where the host waits for the device. loss: this process's part of it."""
        if self.accelerator.num_processes > 1:
            loss = total_over(self.accelerator, loss)
        total, length = torch.stack([loss.float(), norm.to(loss.device).float()]).tolist()
        return total, length

    def _is_fit(self, step: int, loss: float, norm: float, rows: list[int]) -> bool:
        """May the update be taken? Raises Spike, or RunError where no more may be left out."""
        entry = check_update(self.guard, self.state, step, loss, norm, rows)
        if entry is None:
            return True
        before = sum(each["why"] == entry["why"] for each in self.state.get("left_out", []))
        entry = self._write_down(entry)
        if before >= self.guard.skip_nonfinite:
            raise not_finite(entry, self.guard)
        say(f"step {step}: loss or gradient is not finite; left out, its rows are in {LEFT_OUT}")
        return False

    def _write_down(self, entry: dict[str, Any]) -> dict[str, Any]:
        """With the rows of all processes, by their names."""
        rows = gather_object(entry["rows"]) if self.accelerator.num_processes > 1 else entry["rows"]
        entry = entry | {"rows": [self.where(row) for row in rows]}
        self.state.setdefault("left_out", []).append(entry)
        if self.accelerator.is_main_process:
            write_json(self.checkpoints.parent / LEFT_OUT, self.state["left_out"])
        return entry

    def _go_back(self, spike: Spike) -> None:
        """To the last checkpoint's weights, without the data since: they are what led here."""
        self.optimizer.zero_grad(set_to_none=True)
        checkpoint, _ = newest_checkpoint(self.checkpoints)
        assert checkpoint  # one was saved at the start
        self.restore(checkpoint)
        self._write_down(spike.entry | {"back_to": checkpoint.step})
        say(f"step {spike.entry['step']}: {spike}; back to the weights of step {checkpoint.step}, without the batches since")

    def _remember(self, rows: list[int]) -> None:
        """All rows that were ever drawn, as one hash: two runs with the same one have seen the same data in the same order."""
        said = f"{self.state.get('drawn', '')} {rows}"
        self.state["drawn"] = hashlib.sha256(said.encode()).hexdigest()

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
        own = [sum(b.loss_denominator for b in batches), float(sum(b.size for b in batches if b.loss_denominator))]
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
        if plan.eval_steps and done % plan.eval_steps == 0 and not last:
            try:
                self.state["owed"] = True
                if not stopping:
                    self._evaluate(done)
                    del self.state["owed"]
            except Stopped:
                stopping = True
        if stopping or last or (plan.save_steps and done % plan.save_steps == 0):
            if self.checkpoint_gate and not self.checkpoint_gate(done):
                self._end(done)
                return
            self._save(done)
        if stopping and not last:
            why = "as run.stop_after says" if done == self._last else "by a signal"
            raise Stopped(f"stopped {why} after step {done} of {plan.num_steps}, saved; the same command goes on")

    def _end(self, done: int) -> None:
        """With the newest checkpoint's weights; the steps after it are said, and count for nothing."""
        checkpoint, _ = newest_checkpoint(self.checkpoints)
        assert checkpoint  # one was saved at the start
        self.restore(checkpoint)
        self.state[self.unit] = checkpoint.state.get(self.unit, 0)
        self.state["ended"] = {"step": done, "back_to": checkpoint.step}
        say(f"the run ends at step {done} with the weights of step {checkpoint.step}")

    def _evaluate(self, done: int) -> None:
        with self.stop.at_once(self.accelerator.num_processes == 1):
            self.tracker.log(done, self.evaluate(done))

    def _save(self, done: int) -> None:
        method = self.method.state() if self.method else {}
        save_checkpoint(
            self.checkpoints, done, self.module, self.optimizer, method,
            self.state | {"window": self.window.state(), "lines": self.tracker.lines},
            keep=self.plan.keep_checkpoints, is_writer=self.accelerator.is_main_process, spare=self.state.get("within"),
        )  # fmt: skip
        self.accelerator.wait_for_everyone()

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
    number = (seed * 1_000_003 + step) * 8191 + part
    torch.manual_seed(number)
    random.seed(number)  # nothing of ours draws from these two; a reward function may
    np.random.seed(number % 2**32)


def _note(values: dict[str, float], unit: str) -> str:
    rate = values[f"train/{unit}_per_second"]
    note = f"loss {values.get('train/loss', math.nan):.4f}  {rate:.3g} {unit}/s"
    if "train/reward" in values:
        note += f"  reward {values['train/reward']:.3f}  kl {values['train/kl']:.3f}"
    return note + (f"  accuracy {values['train/accuracy']:.0%}" if "train/accuracy" in values else "")
