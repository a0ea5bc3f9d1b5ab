"""Updates that are not taken: losses and gradients that are not finite, and steps back after a spike."""

from __future__ import annotations

from typing import Any

from posttrain.console import say
from posttrain.errors import of_all
from posttrain.runs.files import write_json
from posttrain.training.guard import LEFT_OUT, Spike, check_update, diverged, not_finite
from posttrain.training.loop_parts import LoopParts
from posttrain.training.loss_scale import BEYOND, OVERFLOW, overflowed
from posttrain.training.objective import B


class Guarding(LoopParts[B]):
    """A loop that looks at an update before it takes it."""

    def _is_fit(self, step: int, loss: float, norm: float, rows: list[int]) -> bool:
        """May the update be taken? Raises Spike, or RunError where no more may be left out."""
        if overflowed(self.state, loss, norm):
            self._write_down({"step": step, "loss": loss, "grad_norm": str(norm), "rows": rows, "why": OVERFLOW})
            say(f"step {step}: {OVERFLOW}; left out, losses are multiplied by {self.state.loss_scale:g} from here on")
            return False
        entry = check_update(self.guard, self.state, step, loss, norm, rows)
        if entry is None:
            return True
        before = sum(each["why"] == entry["why"] for each in self.state.left_out)
        entry = self._write_down(entry)
        if before >= self.guard.skip_nonfinite:
            why = diverged(self.module, step, self.config.lr) or (BEYOND if self.state.loss_scale else "")
            raise of_all(not_finite(entry, self.guard, why))
        say(f"step {step}: loss or gradient is not finite; left out, its rows are in {LEFT_OUT}")
        return False

    def _write_down(self, entry: dict[str, Any]) -> dict[str, Any]:
        """With its rows by their names."""
        entry = entry | {"rows": [self.where(row) for row in entry["rows"]]}
        self.state.left_out.append(entry)
        self.processes.told(lambda: write_json(self.checkpoints.parent / LEFT_OUT, self.state.left_out))
        return entry

    def _go_back(self, spike: Spike) -> None:
        """Go back to the last checkpoint's weights, and leave out the data since, which led to the spike."""
        self.optimizer.zero_grad(set_to_none=True)
        checkpoint = self._newest()
        self.restore(checkpoint)
        self._write_down(spike.entry | {"back_to": checkpoint.step})
        say(f"step {spike.entry['step']}: {spike}; back to the weights of step {checkpoint.step}, without the batches since")
