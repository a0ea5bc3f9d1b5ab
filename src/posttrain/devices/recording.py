"""CUDA's graphs: work that is recorded once and then started as a whole, without the host's part in each of its kernels.

All that this package asks of them stands here. What is recorded must do the same to the same tensors every time, and may not wait
for the device (`HostWaits` in host_waits.py says where it would).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TypeVar

import torch

from posttrain.errors import first_line

Found = TypeVar("Found")


def records(device: torch.device) -> bool:
    """Can work on it be recorded?"""
    return device.type == "cuda"


@cache
def own_stream(device: int) -> torch.cuda.Stream:
    """The one on which work is done once and recorded: a product's memory stays with the stream that it was asked for on."""
    return torch.cuda.Stream(device)


def once(work: Callable[[], Found]) -> Found:
    """Do the work as it is, as has to be done before it is recorded: what libraries set up at a first call is no part of it."""
    caller = torch.cuda.current_stream()
    own = own_stream(torch.cuda.current_device())
    own.wait_stream(caller)
    with torch.cuda.stream(own):
        found = work()
    caller.wait_stream(own)
    return found


def record(work: Callable[[], Found]) -> Callable[[], Found]:
    """Record the work without doing it; returns what does it, each time into the same tensors.

    Raises RuntimeError with the reason where CUDA does not record it.
    """
    caller, graph = torch.cuda.current_stream(), torch.cuda.CUDAGraph()
    own = own_stream(torch.cuda.current_device())
    try:
        with torch.cuda.graph(graph, stream=own, capture_error_mode="thread_local"):  # other threads may go on
            found = work()
    except Exception as error:
        torch.cuda.set_stream(caller)  # torch does not come back to it where the end of a recording fails as well
        cause = error.__context__ or error
        raise RuntimeError(f"CUDA does not record it: {first_line(cause)}") from cause

    def play() -> Found:
        graph.replay()
        return found

    return play
