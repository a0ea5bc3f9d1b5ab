"""What all launchers share: the run's directory before its processes are there, and what their exit codes mean."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from posttrain.console import say
from posttrain.errors import RunError, Stopped, UserError
from posttrain.runs.directory import choose_dir, open_run
from posttrain.runs.manifest import read_manifest


def opened(config: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """`config` with its directory by its whole path, made or found and free for the processes; and the manifest where the run is
    finished. Raises UserError for what can be refused before anything starts."""
    directory = choose_dir(config).absolute()
    config = {**config, "run": {**config["run"], "dir": str(directory)}}
    run = open_run(config)
    run.close()
    if not run.finished:
        return config, None
    say(f"{directory} is finished already, with this very config: nothing to do")
    return config, read_manifest(directory).to_dict()


def finished(config: dict[str, Any], code: int, count: int) -> dict[str, Any]:
    """The manifest of a run whose processes have ended. code: of the first of `count` that has ended other than well.

    Raises the error that the code means; the process has printed the details itself.
    """
    if code == Stopped.exit_code:
        raise Stopped("stopped by a signal; the same command goes on")
    if code == UserError.exit_code:
        raise UserError("the message is above")
    if code:
        how = f"was ended by signal {-code}" if code < 0 else f"failed (exit {code}); its own message is above"
        whose = f"one of {count} processes" if count > 1 else "the process"
        raise RunError(f"{whose} {how}; the last checkpoint is kept, the same command goes on")
    return read_manifest(Path(config["run"]["dir"])).to_dict()


def threads(count: int) -> str:
    """What OMP_NUM_THREADS is for each of `count` processes on this machine, where the user has not said it."""
    return os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // count))
