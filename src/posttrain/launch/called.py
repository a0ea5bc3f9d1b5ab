"""What a call from Python may ask for, refused in a line before anything is read."""

from __future__ import annotations

import os
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from typing import Any

from posttrain.errors import UserError

_AT_WORK = threading.Lock()


def texts(name: str, words: Sequence[Any]) -> list[str]:
    """The words of a call; a path may stand for one. Raises UserError for a list in place of them, and for what is no text."""
    for word in words:
        if not isinstance(word, str | os.PathLike):
            first = {"run": "'sft', ", "sweep": "'sft', ", "load": "RUN, "}.get(name, "")
            raise UserError(f"{name}: words are texts, each an argument: {name}({first}*words), not a {type(word).__name__}")
    return [os.fspath(word) for word in words]


def require_here(callbacks: Sequence[Any], config: dict[str, Any]) -> None:
    """Raises UserError for callbacks of a run that other processes do."""
    if callbacks and (config["train"]["processes"] > 1 or config["train"]["launcher"] != "local"):
        raise UserError(
            "callbacks: they are of this process, and the run has others; leave out train.processes and train.launcher"
        )


@contextmanager
def one_at_a_time() -> Generator[None]:
    """Raises UserError where a thread, or a callback, begins a run while another is at work: both would draw from one source of
    random numbers, and neither could be made again."""
    if not _AT_WORK.acquire(blocking=False):
        raise UserError("another run is at work in this process; wait for its end, or begin this one in a process of its own")
    try:
        yield
    finally:
        _AT_WORK.release()
