"""How a command can end other than well. The CLI maps each class to an exit code.

Of several processes those that end with the same error say so: `told_by` is the rank of the one that prints it; None: each does.
"""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Generator
from contextlib import contextmanager
from typing import TypeVar


class UserError(Exception):
    """The user's input is wrong: one line that names the field and the fix. Exit code 2, never a traceback."""

    exit_code = 2
    told_by: int | None = None


class RunError(Exception):
    """The run itself failed in a way we can name (disk full, non-finite loss). Exit code 1."""

    exit_code = 1
    told_by: int | None = None


class BeforeStep(RunError):
    """Every process fails alike before a step has changed anything: what has been learnt is saved, and can go on."""


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
    """An error in one line: the first of its message, or two where that ends with a colon; with its class's name where that says
    more."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = " ".join(lines[: 2 if lines and lines[0].endswith(":") else 1]).rstrip(".")
    speaks = isinstance(error, OSError | ValueError | RuntimeError | ImportError) or type(error).__module__ != "builtins"
    return said if said and speaks else ": ".join(filter(None, (type(error).__name__, said)))


# by whom: the system and its loader, the CPU's allocator, CUDA's runtime and driver, cuBLAS, cuDNN, NCCL and Triton
NO_MEMORY = re.compile(
    r"(can't|cannot|failed to|unable to) allocate|not enough memory|out[ _]of[ _]memory|error_memory_allocation"
    r"|status_alloc_failed|bad_alloc|failed to map segment|can't start new thread|\(os error 12\)"
    r"|cublas_status_not_initialized|allocation_failed|failed to cuda calloc|rocblas_status_memory_error|outofmemory",
    re.IGNORECASE,
)


def is_out_of_memory(error: BaseException) -> bool:
    """Was it memory, in whatever words a library says so? CUDA and Python have classes for it, the system a number."""
    while True:
        if isinstance(error, MemoryError) or any(kind.__name__ == "OutOfMemoryError" for kind in type(error).__mro__):
            return True
        if getattr(error, "errno", None) == errno.ENOMEM or NO_MEMORY.search(str(error)):
            return not isinstance(error, UserError | RunError | ValueError)
        if error.__cause__ is None:
            return False
        error = error.__cause__


@contextmanager
def reading(what: str, fix: str, passing: tuple[type[Exception], ...] = ()) -> Generator[None]:
    """A file of others is read here by a library: whatever that raises is about the file, and becomes one line of ours.

    what: field and file, and that it cannot be read. passing: what goes on as it is, besides our own errors and what is about
    memory. POSTTRAIN_DEBUG=1 leaves all as it is.
    """
    try:
        yield
    except (UserError, RunError, *passing):
        raise
    except Exception as error:
        if is_out_of_memory(error) or os.environ.get("POSTTRAIN_DEBUG"):
            raise
        raise UserError(f"{what} ({first_line(error)[:300]}); {fix}") from error
