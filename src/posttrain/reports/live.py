"""The page of a run, a sweep or a recipe that goes on: there at once, written again now and then, and true at the end."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from threading import Event, Thread
from typing import Literal, Self

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


class KeptLive:
    """Inside, a thread writes the page of several runs, which other processes make; on leaving it is written once more.

    write: (state, every) -> the page at `page`; state: running, on leaving by an error stopped or failed, else None: as the runs
    say; every: seconds until it is written again. What goes wrong with it is said once, and ends nothing. what: it is of.
    """

    def __init__(self, page: Path, write: Callable[[str | None, float], object], what: str) -> None:
        self.page, self.write, self.what = page, write, what
        self._over, self._failed = Event(), 0
        self._thread = Thread(target=self._keep, name=f"page of a {what}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._over.set()
        self._thread.join()
        self._write(None if kind is None else "stopped" if issubclass(kind, Stopped | KeyboardInterrupt) else "failed", 0.0)

    def _keep(self) -> None:
        every = EVERY
        while True:
            every = max(EVERY, self._write("running", every) / SHARE)
            if self._over.wait(every):
                return

    def _write(self, state: str | None, every: float) -> float:
        """Returns the seconds that it took."""
        began = time.monotonic()
        try:
            self.write(state, every)
            self._failed = 0
        except Exception as error:
            self._failed += 1
            if self._failed == 2 or (self._over.is_set() and self._failed == 1):  # once may be a file that was being replaced
                say(f"{self.page} cannot be written ({first_line(error)}); the {self.what} goes on")
        return time.monotonic() - began


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
