"""A run in a process of its own, from a config that was checked before it starts."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from typing import Any

import yaml

from posttrain.errors import Stopped
from posttrain.training.signals import forward_to

PYTHON = (sys.executable, "-P")  # without the working directory on its path: a random.py beside the data is no module


def worker_command(config_file: str) -> list[str]:
    """The command of a worker that runs the config in `config_file`."""
    return [*PYTHON, "-m", "posttrain.launch.worker", config_file]


def run_child(config: dict[str, Any], what: str) -> int:
    """The exit code of a worker with this config; signals go on to it. Raises Stopped, about `what`, after one."""
    with tempfile.NamedTemporaryFile("w", suffix=".yaml", encoding="utf-8") as f:
        yaml.safe_dump(config, f, sort_keys=False)
        f.flush()
        child = subprocess.Popen(worker_command(f.name))
        with forward_to(child) as stop:
            code = child.wait()
    if stop.requested and code in (Stopped.exit_code, *range(-64, 1)):
        raise Stopped(f"in {what}; the same command goes on")
    return code
