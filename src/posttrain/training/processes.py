"""The processes of one run: what one of them says to all, and what all of them say together.

Rank 0 alone reads and writes the run's directory, which the others may not see: they may be on another machine.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from posttrain.errors import RunError, Stopped, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """count: how many share the run; rank: this one's number; device: where its tensors are."""

    count: int = 1
    rank: int = 0
    device: torch.device = torch.device("cpu")  # noqa: RUF009 (it cannot be changed)

    @classmethod
    def of(cls, accelerator: Accelerator) -> Processes:
        """Those that accelerate has brought together."""
        return cls(accelerator.num_processes, accelerator.process_index, accelerator.device)

    @property
    def main(self) -> bool:
        """Is this the one that reads and writes the run's directory?"""
        return self.rank == 0

    def gathered(self, mine: T) -> list[T]:
        """What each process has given, by rank; every process must call it."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def all_say(self, mine: bool) -> bool:
        """Whether all processes say yes; every process must call it."""
        return all(self.gathered(mine))

    def told(self, make: Callable[[], T]) -> T:
        """What `make` gives in rank 0, in all of them; its error too, which rank 0 prints. Every process must call it."""
        if self.count == 1:
            return make()
        found, error = _attempt(make) if self.main else (None, None)
        said: list[Any] = [found, _told(error)]
        dist.broadcast_object_list(said, device=self.device)
        if said[1]:
            raise error or said[1]
        return said[0]

    def in_turn(self, make: Callable[[], T]) -> T:
        """`make` in every process: in rank 0, then in the first of each other machine, then in the rest, which find in the cache
        what those have made. An error of one ends all of them, and it alone prints it."""
        if self.count == 1:
            return make()
        turn = 0 if self.main else 1 if os.environ.get("LOCAL_RANK") == "0" else 2
        made: T | None = None
        for now in range(3):
            found, error = _attempt(make) if turn == now else (made, None)
            made = found
            if first := next(filter(None, self.gathered(_told(error))), None):
                raise error or first
        return cast(T, made)

    def spread(self, value: Tensor | None, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Rank 0's `value`, on this process's device; the others say what it looks like. Every process must call it."""
        held = torch.empty(shape, dtype=dtype, device=self.device) if value is None else value.to(self.device).contiguous()
        if self.count > 1:
            dist.broadcast(held.reshape(-1).view(torch.uint8), 0)
        return held


def is_lost_process(error: BaseException) -> bool:
    """Has a collective operation failed because another process has ended? gloo has no error class for it."""
    said = str(error)
    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in said or "Connection closed by peer" in said or "Connection reset" in said)
    )


def keep_group() -> None:
    """Let the process group live as long as the process. gloo's destructor waits for its thread with Python's lock in hand, and
    the thread, where it is letting go of the last tensor, waits for the lock: one stop in ten hung there for ever."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(dist.group.WORLD))


def _attempt(make: Callable[[], T]) -> tuple[T | None, BaseException | None]:
    """What it gives, or its error."""
    try:
        return make(), None
    except (Exception, Stopped) as error:
        return None, error


def _told(error: BaseException | None) -> BaseException | None:
    """The error as the other processes raise it: they leave the same way, and print nothing."""
    if error is None:
        return None
    if not isinstance(error, UserError | RunError | Stopped):
        error = RunError(f"{type(error).__name__}: {error}")
    error.told_by = int(os.environ.get("RANK", "0"))
    return error
