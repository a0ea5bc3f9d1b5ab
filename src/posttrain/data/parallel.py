"""Work on pieces in several processes, its results in order; few pieces stay in this one."""

from __future__ import annotations

import multiprocessing
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from itertools import chain, islice
from typing import Any, TypeVar

Piece = TypeVar("Piece")
Result = TypeVar("Result")

ALONE = 4  # pieces that are not worth another process
_work: Callable[[Any], Any] | None = None  # of a child; it has it from its parent's memory


def in_order(work: Callable[[Piece], Result], pieces: Iterable[Piece]) -> Iterator[Result]:
    """work(piece) of each; never more pieces in memory than a few a process. An error of the work is raised here."""
    pieces = iter(pieces)
    few = list(islice(pieces, ALONE))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if len(few) < ALONE or cores == 1 or not sys.platform.startswith("linux"):
        yield from map(work, chain(few, pieces))
        return
    # a fork has the tokenizer as it is, and asks nothing of the user's own script, as a spawned process would
    context = multiprocessing.get_context("fork")
    waiting: deque[Future[Result]] = deque()
    with ProcessPoolExecutor(cores, context, initializer=_begin, initargs=(work,)) as pool, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside torch's threads, which the child leaves alone
        for piece in chain(few, pieces):
            waiting.append(pool.submit(_do, piece))
            if len(waiting) > 2 * cores:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _begin(work: Callable[[Any], Any]) -> None:
    global _work
    _work = work
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _do(piece: Any) -> Any:
    assert _work
    return _work(piece)
