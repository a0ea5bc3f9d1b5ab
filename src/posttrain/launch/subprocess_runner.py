"""A run in a process of its own, from a config that was checked before it starts."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import Stopped, UserError
from posttrain.training.signals import PARENT, forward_to

PYTHON = (sys.executable, "-P")  # without the working directory on its path: a random.py beside the data is no module


def worker_command(config_file: str) -> list[str]:
    """The command of a worker that runs the config in `config_file`."""
    return [*PYTHON, "-m", "posttrain.launch.worker", config_file]


def in_group(config: dict[str, Any], name: str) -> dict[str, Any]:
    """Runs that one command starts belong together in their tracker, unless the user has grouped them."""
    return {**config, "track": {**config["track"], "group": config["track"]["group"] or name}}


@contextmanager
def config_file(config: dict[str, Any]) -> Generator[Path]:
    """The config beside its run's directory, for as long as a worker may read it. Raises UserError where it cannot be written."""
    place = Path(config["run"]["dir"])
    file = place.with_name(f".{place.name}.yaml")  # the next start of the same writes it anew
    try:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        except OSError as error:
            reason = error.strerror or error
            raise UserError(f"run.dir: cannot write to {file.parent}: {reason}; give another run.dir") from None
        yield file
    finally:
        file.unlink(missing_ok=True)


@contextmanager
def private_config_file(config: dict[str, Any]) -> Generator[Path]:
    """The config where it is nobody else's: a machine other than the first leaves the run's directory alone."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.yaml"
        file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        yield file


def run_child(config: dict[str, Any], what: str) -> int:
    """The exit code of a worker with this config; signals go on to it. Raises Stopped, about `what`, after one."""
    with config_file(config) as file:
        return run_command(worker_command(str(file)), what)


def own_command(words: list[str]) -> list[str]:
    """This program with other words."""
    return [*PYTHON, "-m", "posttrain", *words]


def run_command(command: list[str], what: str) -> int:
    """The exit code of a process; signals go on to it. Raises Stopped, about `what`, after one."""
    child = subprocess.Popen(command, env={**os.environ, PARENT: str(os.getpid())})
    with forward_to(child) as stop:
        code = child.wait()
    if stop.requested and code in (Stopped.exit_code, *range(-64, 1)):
        raise Stopped(f"in {what}; the same command goes on")
    return code
