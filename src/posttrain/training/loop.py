"""The one training loop. It decides when things happen; the loss and the source of batches are given to it."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Generator, Iterator
from typing import NamedTuple, cast

import torch
from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from posttrain.batch import Metrics
from posttrain.config.metrics import rounded
from posttrain.console import Meter, say
from posttrain.devices.out_of_memory import give_back
from posttrain.errors import BeforeStep, RunError, Stopped, is_out_of_memory
from posttrain.tensors import undivided
from posttrain.training.at_rest import weights_at_rest
from posttrain.training.checkpoint import delete_older, save_checkpoint
from posttrain.training.gradients import average_gradients
from posttrain.training.guard import Spike, halved
from posttrain.training.guarding import Guarding
from posttrain.training.judging import Judging
from posttrain.training.loss_scale import unscale
from posttrain.training.metrics import total_over
from posttrain.training.objective import B, Update, UpdateOutcome
from posttrain.training.optimizer import leave, lr_factor, make_moments, plain_optimizer
from posttrain.training.seeding import seed_step


class _Updated(NamedTuple):
    """After an update: its gradient norm and tokens, and how many micro-batches the step has had."""

    norm: float
    tokens: int
    parts: int
    outcome: UpdateOutcome


class Loop(Judging[B], Guarding[B]):
    """Runs steps `start`..config.num_steps."""

    def fit(self, start: int) -> None:
        """Raises Stopped after a signal, with a checkpoint written; RunError on a loss or gradient that is not finite."""
        self._last = start + self.stop_after if self.stop_after else None
        self.window.load(self.state.window, self.processes.rank, self.processes.count)
        if self.processes.main:  # who was killed between a save and this has left one more
            delete_older(self.checkpoints, start, self.config.keep_checkpoints, self._spared)
        self._catch_up(start)
        if (self.guard.spike_mads is not None or self.checkpoint_gate) and not start:
            self._save(start)  # what the first spike, or an end before the first checkpoint, can go back to
        make_moments(plain_optimizer(self.optimizer))
        began, window_tokens, done = time.monotonic(), 0, start
        with Meter(self.name, self.config.num_steps, start) as meter:
            for step in range(start, self.config.num_steps):
                if self.state.ended or self._is_over:
                    break
                stepped = time.monotonic()
                norm, tokens = self._step(step)
                done = step + 1
                self.state.seen += tokens
                self.state.seconds += time.monotonic() - stepped
                window_tokens += tokens
                if done % self.config.log_steps == 0 or done == self.config.num_steps:
                    values = self._log(done, self.window.read(self.accelerator), norm, window_tokens / (time.monotonic() - began))
                    began, window_tokens = time.monotonic(), 0
                    meter.advance(_note(values, self.unit))
                else:
                    meter.advance()
                self._boundary(done)
        self._catch_up(done)
        self._settle(done)
        leave(self.optimizer)

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
                f"stopped by a signal after step {step} of {self.config.num_steps}, saved; the same command goes on"
            ) from None
        except BeforeStep as error:
            raise self._kept(error, step) from error.__cause__
        try:
            while update is not None:
                self.window.add(update.metrics)
                outcome = UpdateOutcome([])
                if update.batches:
                    done = self._update(step, parts, update.batches)
                    norm, tokens, parts, outcome = done.norm, tokens + done.tokens, done.parts, done.outcome
                update = _next(updates, outcome)
        except Spike as spike:
            self._go_back(spike)
        return norm, tokens

    def _kept(self, error: BeforeStep, step: int) -> BeforeStep:
        """The same error, with what has been learnt before `step` saved."""
        self._save(step)
        error.args = (f"{error}; saved after step {step} of {self.config.num_steps}, the same command goes on",)
        return error

    def _update(self, step: int, parts: int, batches: list[B]) -> _Updated:
        """parts: how many micro-batches of the step came before."""
        self.module.train()
        count, tokens, rows = self._totals(batches)
        self._remember(rows)
        loss, metrics, parts = self._gradients(step, parts, batches, count)
        if self.processes.count > 1 and not isinstance(self.module, FSDPModule):  # which has done it in the backward
            average_gradients(self.module)
        unscale((p.grad for p in self.module.parameters()), self.state)
        if self.callback:
            penalty = self.callback.penalty()
            self.window.add({"penalty": (penalty, 1.0)})
            self._add_penalty(penalty)
        clip = self.config.max_grad_norm or math.inf
        norm = undivided(cast(Tensor, self.accelerator.clip_grad_norm_(self.module.parameters(), clip)))
        loss, norm = self._read(loss, norm)
        if self._is_fit(step + 1, loss, norm, rows):
            for group in self.optimizer.param_groups:
                group["lr"] = self._lr(step) * group["lr_ratio"]
            self._change_weights(step + 1)
            for each, share in metrics:
                self.window.add(each, share)
            if self.callback:
                self.callback.after_step(step + 1)
        self.optimizer.zero_grad(set_to_none=True)
        return _Updated(norm, tokens, parts, UpdateOutcome([each for each, share in metrics if share]))

    def _change_weights(self, step: int) -> None:
        """The optimizer's step. Its moments are there and it works in place, so memory is no reason to fail; if it does, some
        weights may be changed, and trying again would change those twice."""
        try:
            self.optimizer.step()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            line = f"step {step}: out of memory while weights were changed, some of them perhaps; this step is not saved"
            raise RunError(f"{line}, the same command goes on from the last checkpoint") from error

    def _gradients(
        self, step: int, parts: int, batches: list[B], count: float
    ) -> tuple[Tensor, list[tuple[Metrics, float]], int]:
        """Gradients of the whole update, in micro-batches that fit into memory; returns this process's part of the mean loss."""
        for _ in self.state.halved:
            batches = halved(batches)
        while True:
            try:
                with weights_at_rest():
                    return self._backward(step, parts, batches, count)
            except Exception as error:
                smaller = halved(batches)
                if not is_out_of_memory(error) or self.accelerator.num_processes > 1 or len(smaller) == len(batches):
                    raise
            # outside of the handler, where nothing holds what the failed pass has kept
            self.optimizer.zero_grad(set_to_none=True)
            give_back()
            batches = smaller
            self.state.halved.append(step + 1)
            times = 2 ** len(self.state.halved)
            say(f"step {step + 1}: out of memory; from here on micro-batches are 1/{times} as large, and {times} times as many")

    def _backward(self, step: int, parts: int, batches: list[B], count: float) -> tuple[Tensor, list[tuple[Metrics, float]], int]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        scale = processes / count * (self.state.loss_scale or 1.0)  # processes' gradients are averaged, sums are wanted
        total, metrics = torch.zeros((), device=self.accelerator.device), []
        for i, batch in enumerate(batches, parts):
            seed_step(self.config.seed, step, i * processes + rank)
            output = self.loss(self.module, batch.to(self.accelerator.device))
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

    def _remember(self, rows: list[int]) -> None:
        """Add the rows of a step to the hash of all rows drawn: runs with the same hash saw the same data in the same order."""
        said = f"{self.state.drawn} {rows}"
        self.state.drawn = hashlib.sha256(said.encode()).hexdigest()

    def _lr(self, step: int) -> float:
        config = self.config
        least = config.min_lr / config.lr
        return config.lr * lr_factor(config.schedule, step, config.num_steps, config.warmup_steps, least, config.decay_steps)

    def _add_penalty(self, penalty: Tensor) -> None:
        """Add the penalty's gradient. It depends on the weights alone, and all processes have the same gradients by now."""
        params = [p for p in self.module.parameters() if p.grad is not None]
        for p, grad in zip(params, torch.autograd.grad(penalty, params, allow_unused=True), strict=True):
            if grad is not None and p.grad is not None:
                p.grad += grad

    def _totals(self, batches: list[B]) -> tuple[float, int, list[int]]:
        """Count, tokens and rows of the whole optimizer step, over all processes. Rows are in the order of one process that has
        their micro-batches together; those that count for nothing have none."""
        mine = [(batch.loss_denominator, batch.size, batch.rows) for batch in batches]
        # a process has as many micro-batches as the others
        everyones = [each for together in zip(*self.processes.gathered(mine), strict=True) for each in together]
        count = sum(denominator for denominator, _, _ in everyones)
        counted = [each for each in everyones if each[0]] if self.processes.count > 1 else everyones
        return (
            count,
            sum(size for denominator, size, _ in everyones if denominator),
            [row for *_, rows in counted for row in rows],
        )

    def _log(self, step: int, averages: dict[str, float], norm: float, rate: float) -> dict[str, float]:
        values = {self.unit: self.state.seen} | {f"train/{name}": value for name, value in averages.items()}
        values |= {"train/grad_norm": norm, "train/lr": self._lr(step - 1), f"train/{self.unit}_per_second": rate}
        self.tracker.log(step, values)
        return values

    def _boundary(self, done: int) -> None:
        """Between two steps: evaluate, save, or leave."""
        config, last = self.config, done == self.config.num_steps
        signalled = self._stop_requested()
        stopping = signalled or done == self._last
        before = self.state.best
        if self.judge and self.judge.keeps if last else config.eval_steps and done % config.eval_steps == 0:
            try:
                self.state.evaluation_owed = True
                if not signalled:
                    self._evaluate(done)
                    self.state.evaluation_owed = False
            except BeforeStep as error:
                raise self._kept(error, done) from error.__cause__
            except Stopped:
                stopping = True
        best = self._best_step == done
        if stopping or last or best or self._is_over or (config.save_steps and done % config.save_steps == 0):
            if not self._may_keep(done):
                self.state.best = before
                self._refuse(done)
                return
            self._save(done)
        if stopping and not last:
            why = "as run.stop_after says" if done == self._last else "by a signal"
            raise Stopped(f"stopped {why} after step {done} of {config.num_steps}, saved; the same command goes on")

    def _save(self, done: int) -> None:
        method = self.callback.state() if self.callback else {}
        self.state.window, self.state.lines = self.processes.gathered(self.window.state()), self.tracker.lines
        with self.saving():
            save_checkpoint(
                self.checkpoints, done, self.module, self.optimizer, method, self.state.to_dict(),
                keep=self.config.keep_checkpoints, processes=self.processes, spare=self._spared,
            )  # fmt: skip

    def _stop_requested(self) -> bool:
        return any(self.processes.gathered(self.stop.requested))


def _next(updates: Iterator[Update[B]], outcome: UpdateOutcome) -> Update[B] | None:
    """The update after the one that ended with `outcome`, of which a generator is told."""
    try:
        return updates.send(outcome) if isinstance(updates, Generator) else next(updates)
    except StopIteration:
        return None


def _note(values: dict[str, float], unit: str) -> str:
    rate = values[f"train/{unit}_per_second"]
    note = f"loss {values.get('train/loss', math.nan):.4f}  {rounded(rate)} {unit}/s"
    if "train/reward" in values:
        note += f"  reward {values['train/reward']:.3f}  kl {values['train/kl']:.3f}"
    return note + (f"  accuracy {values['train/accuracy']:.0%}" if "train/accuracy" in values else "")
