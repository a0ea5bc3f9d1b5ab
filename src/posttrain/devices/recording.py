"""CUDA's graphs: work that is recorded once and then started as a whole, without the host's part in each of its kernels.

All that this package asks of them stands here. What is recorded must do the same to the same tensors every time, and may not wait
for the device (`HostWaits` in host_waits.py says where it would).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

from posttrain.errors import first_line

Found = TypeVar("Found")


def records(device: torch.device) -> bool:
    """Can work on it be recorded?"""
    return device.type == "cuda"


class Recorder:
    """What it does is done on a stream of its own, as CUDA wants it, and in turn with the caller's."""

    def __init__(self) -> None:
        self.stream = torch.cuda.Stream()

    def once(self, work: Callable[[], Found]) -> Found:
        """Do the work as it is. It has to be done so before it is recorded: what libraries set up at a first call is no part of
        it."""
        caller = torch.cuda.current_stream()
        self.stream.wait_stream(caller)
        with torch.cuda.stream(self.stream):
            found = work()
        caller.wait_stream(self.stream)
        return found

    def record(self, work: Callable[[], Found]) -> Callable[[], Found]:
        """Record the work without doing it; returns what does it, each time into the same tensors.

        Raises RuntimeError with the reason where CUDA does not record it.
        """
        caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
        try:
            # other threads may go on meanwhile
            with torch.cuda.graph(graph, stream=self.stream, capture_error_mode="thread_local"):
                found = work()
        except Exception as error:
            torch.cuda.set_stream(caller)  # torch does not come back to it where the end of a recording fails as well
            cause = error.__context__ or error
            raise RuntimeError(f"CUDA does not record it: {first_line(cause)}") from cause

        def play() -> Found:
            graph.replay()
            return found

        return play
