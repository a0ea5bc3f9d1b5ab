"""The page of a run that goes on: there from its first step, written again now and then, and true when the run has ended."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Literal

from posttrain.console import is_main, say
from posttrain.errors import RunError, Stopped, UserError, first_line
from posttrain.reports.run_page import run_page
from posttrain.runs.files import PAGE
from posttrain.runs.status import Status, ended, write_status

EVERY = 10.0  # seconds between two pages, at least
SHARE = 0.01  # of a run's time, which its pages take at most


class LivePage:
    """Writes report.html of a run that trains. What goes wrong with it is said once, and ends no run."""

    def __init__(self, directory: Path, write: Callable[[Path], object] = run_page) -> None:
        self.directory, self.write = directory, write
        self.next, self.has_complained = 0.0, False

    @classmethod
    def begun(cls, directory: Path, steps: int, start: int) -> LivePage:
        """Of a run that now begins to train, at step `start` of `steps`."""
        page = cls(directory)
        page._write(replace(Status.of_this_process(), steps=steps, start=start, began=time.time()))
        return page

    def log(self) -> None:
        """There are new metrics: write the page, if it is time."""
        if time.monotonic() >= self.next:
            self._write()

    def _write(self, status: Status | None = None) -> None:
        began = time.monotonic()
        try:
            if status:
                write_status(self.directory, status)
            self.write(self.directory)
        except Exception as error:
            if not self.has_complained:
                say(f"{self.directory / PAGE} cannot be written ({first_line(error)}); the run goes on")
            self.has_complained = True
        now = time.monotonic()
        self.next = now + max(EVERY, (now - began) / SHARE)


@contextmanager
def told_of(directory: Path) -> Generator[None]:
    """Inside, a run is at work in `directory`: status.json says so, and how it has ended where that is before its end."""
    if not is_main():
        yield
        return
    with suppress(OSError):  # what cannot be written now will be in the way of the run itself
        write_status(directory, Status.of_this_process())
    try:
        yield
    except (Stopped, KeyboardInterrupt) as error:
        _tell(directory, "stopped", str(error))
        raise
    except BaseException as error:
        _tell(directory, "failed", str(error) if isinstance(error, UserError | RunError) else first_line(error))
        raise


def _tell(directory: Path, state: Literal["stopped", "failed"], why: str) -> None:
    """Whatever ended the run may hold this up too: a full disk, a directory that is gone."""
    try:
        ended(directory, state, why)
        if (directory / PAGE).exists():
            run_page(directory)
    except Exception:
        return
