"""`posttrain verify-resume`: does a run of this very config, on this very machine, survive being stopped?"""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

from posttrain.commands.compare_runs import RunComparison, compare_runs
from posttrain.config.compose import compose_run
from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.launch.subprocess_runner import run_child


def verify_resume(stage: str, words: list[str], steps: int, config_dir: Path | None = None) -> list[RunComparison]:
    """Run a few steps straight through and again with a stop half-way, and compare what they leave.

    Raises UserError as the run itself would, RunError where something differs; the two directories are then kept.
    """
    if steps < 2:
        raise UserError("--steps: a run of fewer than 2 steps cannot be stopped half-way")
    config = compose_run(stage, words, config_dir)
    config["train"] |= {"max_steps": steps, "save_steps": None, "eval_steps": None, "log_steps": 1}
    place = Path(config["run"]["dir"] or "runs/verify-resume").expanduser() / time.strftime("%Y%m%d-%H%M%S")
    half = steps // 2
    say(f"{steps} steps straight through")
    _run(config, place / "straight", None)
    say(f"the same, stopped after {half}")
    _run(config, place / "stopped", half)
    say("and going on")
    _run(config, place / "stopped", None)
    found = compare_runs(place / "straight", place / "stopped")
    for each in found:
        say(f"{each.part:<12}{each.text}")
    if wrong := [each.part for each in found if not each.same]:
        raise RunError(f"{', '.join(wrong)} not the same after a stop, in {place}; nothing but the stop was different")
    shutil.rmtree(place)
    say("a stop changes nothing")
    return found


def _run(config: dict[str, Any], directory: Path, stop_after: int | None) -> None:
    run = {**config["run"], "dir": str(directory), "stop_after": stop_after}
    code = run_child({**config, "run": run}, "verify-resume")
    if code == UserError.exit_code:
        raise UserError("the message is above")
    if code != (Stopped.exit_code if stop_after else 0):
        raise RunError(f"the run failed (exit {code}), its own message is above")
