"""What evaluations decide: the best checkpoint, the end of patience, weights that may not be kept."""

from __future__ import annotations

import math

from posttrain.console import say
from posttrain.training.checkpoint import Checkpoint, checkpoint_of
from posttrain.training.loop_parts import LoopParts
from posttrain.training.objective import B
from posttrain.training.optimizer import as_left
from posttrain.training.state import TrainState


class Judging(LoopParts[B]):
    """A loop that is evaluated, and may end before its last step."""

    def _evaluate(self, done: int) -> None:
        """After the last step what the result measures is logged, by the run."""
        with self.stop.at_once(self.accelerator.num_processes == 1), as_left(self.optimizer):
            values = self.evaluate(done)
            if done < self.config.num_steps:
                self.tracker.log(done, values)
        if judge := self.judge:
            value = self.processes.told(
                lambda: float(values.get(judge.metric, math.nan))
            )  # or machines that round differently part here
            self.state.best = judge.judged(self.state.best, done, value)

    def _catch_up(self, done: int) -> None:
        """Make an evaluation that a stop came before."""
        if self.state.evaluation_owed:
            self._evaluate(done)
            self.state.evaluation_owed = False

    @property
    def _is_over(self) -> bool:
        return bool(self.judge and self.judge.is_over(self.state.best))

    @property
    def _best_step(self) -> int | None:
        """Whose checkpoint stays, and is the result."""
        return self.judge.kept(self.state.best) if self.judge else None

    @property
    def _spared(self) -> tuple[int | None, int | None]:
        """Steps whose checkpoints stay, beside the newest."""
        return self.state.within_budget, self._best_step

    def _best(self) -> Checkpoint | None:
        step = self._best_step
        return None if step is None else self.processes.told(lambda: checkpoint_of(self.checkpoints, step))

    def _may_keep(self, done: int) -> bool:
        """As `checkpoint_gate` says of what the run would leave now."""
        if self.checkpoint_gate is None:
            return True
        with as_left(self.optimizer):
            return self.checkpoint_gate(done)

    def _refuse(self, done: int) -> None:
        """End the run with the best checkpoint that there is, or else the newest: the weights of now may not be kept."""
        checkpoint = self._best() or self._newest()
        self._end(done, checkpoint)
        say(f"the run ends at step {done} with the weights of step {checkpoint.step}")

    def _settle(self, done: int) -> None:
        """After the last step, or the end of patience: the result is the best checkpoint, where it is looked for."""
        best = self.state.best
        if self.state.ended or self.judge is None or best is None:
            return
        say(self.judge.told(best, done, self.config.num_steps, self.state.before.get(self.judge.metric)))
        checkpoint = None if self._best_step == done else self._best()
        if checkpoint or done < self.config.num_steps:
            self._end(done, checkpoint)

    def _end(self, done: int, checkpoint: Checkpoint | None = None) -> None:
        """End the run, with a checkpoint's weights in place of today's. The steps after it were printed, and do not count."""
        if checkpoint:
            self.restore(checkpoint)
            self.state.seen = TrainState.from_dict(checkpoint.state).seen
        self.state.ended = {"step": done, "back_to": checkpoint.step if checkpoint else done}
