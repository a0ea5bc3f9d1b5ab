"""Failures of the machine, by name: a disk that refuses, memory that is full."""

from __future__ import annotations

import errno
from pathlib import Path
from typing import Any

from posttrain.console import is_main
from posttrain.errors import RunError, UserError, first_line, is_out_of_memory

DISK = {
    errno.ENOSPC: "the disk is full; free some space",
    errno.EDQUOT: "the disk quota is used up; free some space",
    errno.EFBIG: "a file would be larger than this system or its limits (ulimit -f) allow; raise them",
    errno.EROFS: "the disk is mounted read-only; mount it for writing",
    errno.EIO: "the disk does not answer; see to it",
    errno.ESTALE: "the network disk has gone; see to it",
    errno.ENODEV: "the disk has gone; see to it",
}
GOES_ON = "what was saved is kept, and the same command goes on from there"


def named(error: Exception, config: dict[str, Any], directory: Path) -> RunError | None:
    """One line that says what happened to the run in `directory` and how to go on, or None for a failure without a name."""
    from posttrain.training.processes import is_lost_process

    if is_lost_process(error):
        found = f"another process of the run has ended or cannot be reached ({first_line(error)})"
        return RunError(f"{found}; it has said why if it could; {GOES_ON}")
    if is_out_of_memory(error):
        return RunError(f"out of memory; {_smaller(config)}; {GOES_ON}")
    if said := said_by_disk(error):
        return RunError(f"{getattr(error, 'filename', None) or directory}: {said}; {GOES_ON}")
    if isinstance(error, OSError) and is_main() and not directory.is_dir():  # of several processes others may not see it
        return RunError(f"run.dir: {directory} has vanished while the run was at work; bring it back, the same command goes on")
    return None


def said_by_disk(error: Exception) -> str:
    """What a disk has refused, and the fix; '' where it was no disk."""
    number = getattr(error, "errno", None)
    return next((text for code, text in DISK.items() if code == number or f"os error {code})" in str(error)), "")


def _smaller(config: dict[str, Any]) -> str:
    """What `posttrain plan` would try."""
    from posttrain.config.memory_savers import memory_savers
    from posttrain.config.stages import typed_config

    try:
        found = memory_savers(typed_config(config))
    except (UserError, AttributeError):  # a stage that no plan is made for
        found = []
    tries = ", or ".join(found[:3]) or "a smaller train.batch_size"
    return f"try {tries} in a new run.dir (posttrain plan {config['stage']} ... says what each would take)"
