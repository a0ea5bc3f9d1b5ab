"""Signals that ask a run to stop: obeyed at once where there is nothing to save, else at the next step boundary."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import AbstractContextManager, contextmanager, suppress
from types import FrameType
from typing import Protocol

from posttrain.console import is_main
from posttrain.errors import Stopped

# Slurm sends USR1 before its time limit, submitit USR2, a terminal that is closed HUP
NAMES = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGHUP")
SIGNALS = tuple(getattr(signal, name) for name in NAMES if hasattr(signal, name))
PARENT = "POSTTRAIN_PARENT"  # in a child's environment: the process that it is not to outlive


def caught() -> list[signal.Signals]:
    """`SIGNALS`, but for what is ignored from the start: nohup means a run to outlive its terminal. None in a thread: signals are
    the main thread's alone, and what is called in another does without."""
    if threading.current_thread() is not threading.main_thread():
        return []
    return [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]


def leave_with_parent(is_sure: bool = True) -> None:
    """Have this process stopped (SIGTERM) when the one that started it is gone, however that ends: on Linux, where `PARENT`
    names it. is_sure: that one has started it directly, so that another parent means that it is gone already."""
    parent = int(os.environ.get(PARENT) or 0)
    if parent in (0, os.getpid()) or not sys.platform.startswith("linux"):
        return
    del os.environ[PARENT]  # of this process, not of its children
    if os.getppid() == parent:
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if is_sure and os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGTERM)


class Sends(Protocol):
    """A child, as far as signals go: a Popen, or what stands for one."""

    def send_signal(self, sig: int, /) -> None:
        """Hand it a signal."""
        ...


def say_at_once(line: str) -> None:
    """Tell the user from within a handler, in the process that prints: past the console, which may be in the middle of a line."""
    if is_main():
        with suppress(OSError):  # nobody may be there to read it
            os.write(2, f"{chr(10) if os.isatty(2) else ''}{line}\n".encode())


class StopSignal:
    """Installs handlers. The first signal sets `requested`, or raises Stopped inside of `at_once`; a second one ends the process.

    Repeats within a second count as the first: Ctrl-C reaches a child both from the terminal and from its launcher.
    """

    def __init__(self) -> None:
        self.requested = False
        self.since = 0.0
        self.leaves = False
        self.before = {number: signal.signal(number, self._note) for number in caught()}

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.requested and time.monotonic() - self.since > 1.0:
            os._exit(Stopped.exit_code)
        if not self.requested:
            self.requested, self.since = True, time.monotonic()
            if self.leaves:
                self.check()
            say_at_once("stopping: what is begun is finished and saved first; Ctrl-C again ends at once, without it")

    def check(self) -> None:
        """Leave a phase that has nothing of its own to save. Raises Stopped."""
        if self.requested:
            raise Stopped("stopped by a signal between steps; the same command goes on")

    @contextmanager
    def at_once(self, allowed: bool = True) -> Generator[None]:
        """Inside, a signal raises Stopped at once. allowed: False where other processes would wait for this one."""
        self.leaves, before = allowed, self.leaves
        try:
            yield
        finally:
            self.leaves = before
        if allowed:
            self.check()  # what a callback has swallowed

    def restore(self) -> None:
        """Put the earlier handlers back, but for signals that are ignored since."""
        for number, handler in self.before.items():
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, handler)


def ignore() -> None:
    """From here on no signal ends this process, which leaves by itself: of several processes that stop at the same step, some may
    hear of the signal late."""
    for number in caught():
        signal.signal(number, signal.SIG_IGN)


@contextmanager
def leaving_at_once() -> Generator[None]:
    """Inside, a signal raises Stopped, until other handlers are installed."""
    stop = StopSignal()
    try:
        with stop.at_once():
            yield
    finally:
        stop.restore()


@contextmanager
def passing_on(to: Callable[[int], None]) -> Generator[StopSignal]:
    """While inside, `to` is called with each signal; the yielded object says whether one came."""
    stop = StopSignal()

    def pass_on(number: int, frame: FrameType | None) -> None:
        stop.requested = True
        to(number)

    for number in stop.before:
        signal.signal(number, pass_on)
    try:
        yield stop
    finally:
        stop.restore()


def forward_to(child: Sends) -> AbstractContextManager[StopSignal]:
    """While inside, signals go on to `child`, which saves and leaves."""
    return passing_on(child.send_signal)
