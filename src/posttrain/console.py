"""What the user reads while a run goes on: plain lines anywhere, a live bar on a terminal."""

from __future__ import annotations

import os
import re
import textwrap
import time
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from types import TracebackType

from rich.console import Console, ConsoleOptions, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.segment import Segment
from rich.text import Text

from posttrain.secrets import redact

_CONTROLS = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]"
)  # all but \n and \t; order of writing


def printable(text: str) -> str:
    """`text` with its control characters written out, so that a row, a name or an answer cannot steer the terminal."""
    return _CONTROLS.sub(lambda found: f"\\x{ord(found[0]):02x}" if found[0] < "\u0100" else f"\\u{ord(found[0]):04x}", text)


def silence() -> None:
    """Send standard output to nowhere, and errors too where they went to the same place."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    out, errors = (os.fstat(number) for number in (1, 2))
    for number in (1, 2) if (out.st_dev, out.st_ino) == (errors.st_dev, errors.st_ino) else (1,):
        os.dup2(nowhere, number)
    os.close(nowhere)


class _Terminal(Console):
    """A console on which only styles and bars of our own steer the terminal, whatever is in tables and texts."""

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """As the base's: all that is printed comes through here."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=printable(segment.text))

    def _check_buffer(self) -> None:
        try:
            super()._check_buffer()
        except OSError:  # a terminal that is closed, a full disk
            self.on_broken_pipe()

    def on_broken_pipe(self) -> None:
        """Nobody reads any more (`| head`, a closed terminal): the run goes on without a word."""
        self.quiet = True
        silence()


console = _Terminal(highlight=False, soft_wrap=True, markup=False, emoji=False)
QUIET_SECONDS = 5.0  # without a terminal, at most one line of progress in so many seconds


def is_main() -> bool:
    """True in the one process that prints: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def output_alone(is_alone: bool = True) -> Generator[None]:
    """What is said meanwhile goes to standard error: on standard output stands a file that may be kept."""
    before, console.stderr = console.stderr, is_alone or console.stderr
    try:
        yield
    finally:
        console.stderr = before


def say(line: str) -> None:
    """Print a line, in the one process that prints, with secrets hidden. On a terminal it breaks between words, and a long path
    nowhere, so that it can be copied."""
    if is_main():
        text = redact(line)
        console.print("\n".join(map(_broken, text.split("\n"))) if console.is_terminal else text)


def _broken(line: str) -> str:
    return textwrap.fill(
        line,
        console.width,
        subsequent_indent="    ",
        break_long_words=False,
        break_on_hyphens=False,
        replace_whitespace=False,
        expand_tabs=False,
    )


class Meter:
    """Progress of one phase: a bar with rate and ETA on a terminal, now and then a line elsewhere. total: None where it is not
    known."""

    def __init__(self, what: str, total: int | None, start: int = 0) -> None:
        self.what, self.total, self.done, self.start = what, total, start, start
        self.began = self.spoke = self.reached = time.monotonic()
        self.bar: Progress | None = None
        self.task = TaskID(0)

    def __enter__(self) -> Meter:
        if is_main() and console.is_terminal:
            columns = (TextColumn("{task.description:<10}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
            self.bar = Progress(*columns, TimeElapsedColumn(), _Eta(self), console=console)
            self.bar.start()
            self.task = self.bar.add_task(self.what, total=self.total, completed=self.start, note="")
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar:
            self.bar.stop()

    def advance(self, note: str = "", by: int = 1) -> None:
        """`by` units of the phase are done; `note` is shown beside the bar."""
        now = self.reached = time.monotonic()
        self.done += by
        if self.bar:
            self.bar.update(self.task, completed=self.done, note=note)
            return
        if is_main() and (self.done == self.total or now - self.spoke >= QUIET_SECONDS):
            self.spoke = now
            if self.total is None:
                say("  ".join(filter(None, (f"{self.what} {self.done:,}", note, f"in {_clock(now - self.began)}"))))
                return
            clock = self.eta(now) if self.done < self.total else f"in {_clock(now - self.began)}"
            say("  ".join(filter(None, (f"{self.what} {self.done}/{self.total}", note, clock))))

    def eta(self, now: float) -> str:
        """The time that what is left will take, by what all units of this start took; it runs down within a long one."""
        if self.total is None:
            return ""
        if self.done == self.start:
            return "eta -:--"
        each = (self.reached - self.began) / (self.done - self.start)
        return f"eta {_clock(max(0.0, each * (self.total - self.done) - (now - self.reached)))}"


class _Eta(ProgressColumn):
    """The meter's own estimate: rich's forgets every unit that took longer than half a minute."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def render(self, task: Task) -> Text:
        """As a column of the bar."""
        return Text(self.meter.eta(time.monotonic()))


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"
