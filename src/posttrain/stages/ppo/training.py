"""3. PPO's steps: a rollout, the updates that it feeds, and what is watched meanwhile."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.batch import LossOutput, PackedBatch
from posttrain.console import say
from posttrain.losses.advantages import adapted
from posttrain.rewards import combined
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.language.samples import keep_samples
from posttrain.stages.language.training import policy_of
from posttrain.stages.ppo.config import Ppo
from posttrain.stages.ppo.diagnostics import alarms
from posttrain.stages.ppo.draws import drawn_until_full
from posttrain.stages.ppo.rollout import Roller, Rollout, Written, figures_of
from posttrain.stages.ppo.updates import ppo_batches, ppo_loss
from posttrain.stages.steps import Context, Measured, Session
from posttrain.training.objective import Update, UpdateOutcome
from posttrain.training.processes import Processes
from posttrain.training.seeding import row_seed, seed_step

DRAWS = 7999  # the part of a step's random numbers by which further prompts are drawn
ROLLOUT = 8000  # the part of a step's random numbers that sampling uses; training takes those from 0


@dataclass
class PpoState:
    """What a checkpoint keeps of this stage. first: figures of the first step. ringing: alarms that were said and hold on.
    row_seeds: has every prompt random numbers of its own? A run that version 0.2 or an earlier one began has not, and ends as it
    would have. rewards: what reward functions remember, by name."""

    kl_coef: float
    first: dict[str, float] | None = None
    alarms: list[dict[str, Any]] = field(default_factory=list)
    ringing: list[str] = field(default_factory=list)
    row_seeds: bool = False
    rewards: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PpoTraining:
    """What a step of PPO draws, computes and measures."""

    context: Context
    data: PreparedData
    roller: Roller
    session: Session

    @property
    def cfg(self) -> Ppo:
        """The run's config."""
        return self.context.cfg

    @property
    def state(self) -> PpoState:
        """What checkpoints keep of PPO alone."""
        return self.session.state.stage

    def updates(self, step: int) -> Generator[Update[PackedBatch], UpdateOutcome, None]:
        """A rollout, then `epochs` passes over it in shuffled minibatches, and the figures of the step."""
        cfg = self.cfg.ppo
        began, clipped = time.monotonic(), _Ratio()
        seed_step(self.cfg.train.seed, step, ROLLOUT)
        processes = self.session.processes
        rollout, drawn = self._rollout(step)
        parts, figures = ppo_batches(self.cfg, rollout, self.state.kl_coef)
        tokens = drawn.pop("drawn_tokens", float(rollout.mask.sum()))
        figures |= drawn | {"rollout_tokens_per_second": tokens / (time.monotonic() - began)}
        began, tokens, updates = time.monotonic(), 0, 0
        for minibatch in self._minibatches(step, parts):
            if not sum(processes.gathered(sum(batch.loss_denominator for batch in minibatch))):
                continue  # none of its answers counts
            outcome = yield Update(minibatch)
            tokens, updates = tokens + sum(batch.size for batch in minibatch), updates + 1
            clipped.add(outcome)
            # the sums stay on the device until here: one wait an update
            if cfg.stop_kl is not None and _kl_of(processes, outcome) > cfg.stop_kl:
                break
        figures["update_tokens_per_second"] = sum(processes.gathered(tokens)) / (time.monotonic() - began)
        figures["updates"] = float(updates)
        self.state.rewards = {each.name: state for each in self.roller.functions if (state := each.state()) is not None}
        if cfg.target_kl:
            self.state.kl_coef = adapted(self.state.kl_coef, figures["kl"], cfg.target_kl, cfg.kl_rate)
        yield Update([], {name: (torch.tensor(value), 1.0) for name, value in figures.items()})
        self._watch(step + 1, figures, clipped.share(processes), len(rollout.answers))

    def _rollout(self, step: int) -> tuple[Rollout, dict[str, float]]:
        """Answers to the step's own prompts, or with dynamic sampling to those of its draws that teach something, and the figures
        of all draws."""
        cfg, order, examples = self.cfg.ppo, self.data.order, self.data.data.train
        everyones = zip(*(order.micro(step, rank) for rank in range(order.world_size)), strict=True)
        micro = [units for together in everyones for units in together if units]
        if not cfg.dynamic_sampling:
            return self.roller.roll(examples, micro, cfg.samples, self._seeds(step, ROLLOUT), cfg.advantage == "gae"), {}
        written, figures = drawn_until_full(self._draws(step, micro), self._shaped, sum(map(len, micro)), order.batch_size)
        return self.roller.read(examples, written), figures

    def _draws(self, step: int, micro: list[list[int]]) -> Iterator[Written]:
        """Answers to the step's own prompts, then to others, as many at a time. Which those are follows from the seed and the
        step: no state goes into a checkpoint."""
        cfg, mixture = self.cfg.ppo, self.data.data
        wanted = sum(map(len, micro))
        more: Iterator[int] = iter(())
        for number in range(cfg.max_draws):
            if number == 1:
                more = iter(mixture.others(row_seed(self.cfg.train.seed, step, DRAWS, 0), wanted * (cfg.max_draws - 1)))
            if number:
                micro = [[next(more) for _ in units] for units in micro]
            yield self.roller.write(mixture.train, micro, cfg.samples, self._seeds(step, ROLLOUT, number * wanted))

    def _shaped(self, written: Written) -> Tensor:
        return combined(list(written.scores.values()), written.ended, self.cfg.reward, written.lengths)[1]

    def _seeds(self, step: int, part: int, before: int = 0) -> Callable[[int], int] | None:
        """Of the prompt at each place, that of the first being `before`; None: torch's global numbers, which only one process can
        draw from."""
        seed = partial(row_seed, self.cfg.train.seed, step, part)
        own = self.state.row_seeds or self.session.processes.count > 1
        return (lambda place: seed(before + place)) if own else None

    def _minibatches(self, step: int, parts: list[list[PackedBatch]]) -> list[list[PackedBatch]]:
        """The rollout's packs dealt into minibatches, shuffled anew for each epoch."""
        cfg = self.cfg.ppo
        shuffled = torch.Generator().manual_seed(self.cfg.train.seed * 1_000_003 + step)
        groups = [parts[i :: cfg.minibatches] for i in range(min(cfg.minibatches, len(parts)))]
        order = [int(i) for _ in range(cfg.epochs) for i in torch.randperm(len(groups), generator=shuffled)]
        return [[batch for part in groups[i] for batch in part] for i in order]

    def loss(self, module: nn.Module, batch: PackedBatch) -> LossOutput:
        """The loss of a micro-batch, of the policy or of the values."""
        return ppo_loss(self.cfg, module, batch, self.state.kl_coef)

    def measure(self, done: int, check: Callable[[], None]) -> Measured:
        """Answers to the held-out prompts, and tasks of lm-eval where it is their turn."""
        found, tasks = self._answered(done, check), self.data.tasks
        asked = tasks.during(done, policy_of(self.session.module), self.session) if tasks else {}
        return replace(found, metrics=found.metrics | asked)

    def _answered(self, done: int, check: Callable[[], None]) -> Measured:
        """Of the held-out prompts, always by the same random numbers."""
        examples, size = self.data.data.held_out, self.cfg.train.batch_size
        if not len(examples):
            return Measured()
        seed_step(self.cfg.train.seed, 0, ROLLOUT + 1)
        micro = [list(range(i, min(i + size, len(examples)))) for i in range(0, len(examples), size)]
        rollout = self.roller.roll(examples, micro, 1, self._seeds(0, ROLLOUT + 1))
        check()
        reward, _ = combined(list(rollout.scores.values()), rollout.ended, self.cfg.reward)
        rows = {"reward": reward.tolist(), "kl": rollout.kl.tolist(), "length": rollout.lengths.tolist()}
        if self.context.main:
            scores = [{"reward": float(each)} for each in reward]
            keep_samples(self.context.directory, done, self.data.order.num_steps, rollout.prompts, rollout.texts, scores)
        return Measured({f"eval/{name}": value for name, value in figures_of(rollout, reward).items()}, rows)

    def _watch(self, step: int, figures: dict[str, float], clip_fraction: float, answers: int) -> None:
        """Say what leaves its healthy range, once until it has come back."""
        state = self.state
        found = {"explained_variance": 0.0, **figures, "clip_fraction": clip_fraction, "step": step, "answers": answers}
        state.first = state.first or found
        ringing = alarms(found, state.first, self.cfg.ppo)
        for name, line in ringing.items():
            if name not in state.ringing:
                say(f"step {step}: {line}")
                state.alarms.append({"step": step, "text": line})
        state.ringing = sorted(ringing)


class _Ratio:
    """The share of ratios that were clipped, over all updates of a step, on the device until it is read."""

    def __init__(self) -> None:
        self.clipped: float | Tensor = 0.0
        self.count: float | Tensor = 0.0

    def add(self, outcome: UpdateOutcome) -> None:
        clipped, _ = outcome.total("clip_fraction")
        _, count = outcome.total("update_kl")
        self.clipped, self.count = self.clipped + clipped, self.count + count

    def share(self, processes: Processes) -> float:
        clipped, count = _added_up(processes, self.clipped, self.count)
        return clipped / max(count, 1.0)


def _kl_of(processes: Processes, outcome: UpdateOutcome) -> float:
    """Nats a token by which an update's policy is away from the one that sampled, over all processes."""
    total, count = _added_up(processes, *outcome.total("update_kl"))
    return total / count if count else 0.0


def _added_up(processes: Processes, total: float | Tensor, count: float | Tensor) -> tuple[float, float]:
    found = processes.gathered((float(total), float(count)))
    return sum(each[0] for each in found), sum(each[1] for each in found)
