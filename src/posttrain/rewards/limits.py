"""A limit to how long other people's code may take."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class OutOfTime(BaseException):
    """The limit has been reached. No Exception, for who handles errors should not take it for one."""


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Raises OutOfTime in what is done meanwhile, again every second until it gives way.

    By the system's alarm, which also ends a regular expression that backtracks for ever and a wait for the network. Code that
    sets an alarm of its own takes this one's place; outside of the main thread, which alone gets signals, there is no limit.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(number: int, frame: FrameType | None) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds, 1.0)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
