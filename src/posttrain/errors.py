"""How a command can end other than well. The CLI maps each class to an exit code.

Of several processes those that end with the same error say so: `told_by` is the rank of the one that prints it; None: each does.
"""

from __future__ import annotations

from typing import TypeVar


class UserError(Exception):
    """The user's input is wrong: one line that names the field and the fix. Exit code 2, never a traceback."""

    exit_code = 2
    told_by: int | None = None


class RunError(Exception):
    """The run itself failed in a way we can name (disk full, non-finite loss). Exit code 1."""

    exit_code = 1
    told_by: int | None = None


class Stopped(BaseException):
    """A signal ended the run at a step boundary after saving; the same command goes on. Exit code 75.

    Like KeyboardInterrupt it is no Exception: nobody who handles errors should take it for one.
    """

    exit_code = 75
    told_by: int | None = 0  # all stop at the same step


E = TypeVar("E", UserError, RunError)


def of_all(error: E) -> E:
    """An error that every process of the run comes to by itself: rank 0 prints it."""
    error.told_by = 0
    return error


def did_you_mean(word: str, known: list[str]) -> str:
    """`" - did you mean 'optim.lr'?"` when a near name exists, else an empty string."""
    import difflib

    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" - did you mean '{near[0]}'?" if near else ""


def first_line(error: BaseException) -> str:
    """The first line of an error's message, without its full stop; its class's name where there is none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
