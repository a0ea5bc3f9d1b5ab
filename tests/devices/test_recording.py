"""Recording work with CUDA, by a stand-in of its graphs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tests.devices.graphs import stand_in

from posttrain.devices.recording import once, record
from posttrain.errors import is_out_of_memory


def test_work_is_recorded_without_being_done_and_done_on_the_same_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """x goes from 1 to 2 once, stays 2 while it is recorded, and then goes to 4 and to 8."""
    made, x, calls = stand_in(monkeypatch), torch.ones(3), list[int]()

    def double() -> torch.Tensor:
        calls.append(1)
        return x.mul_(2) + 1

    assert once(double).tolist() == [3.0] * 3
    play = record(double)
    assert x.tolist() == [2.0] * 3
    first = play()
    assert first.tolist() == [5.0] * 3 and x.tolist() == [4.0] * 3
    assert play() is first and first.tolist() == [9.0] * 3
    assert len(calls) == 2 and made[0].replays == 2


def test_the_first_error_counts_and_the_stream_is_the_callers_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA ends a recording that failed with an error of its own, and torch then stays on the recording's stream."""
    stand_in(monkeypatch)
    streams: list[Any] = []

    @contextmanager
    def graph(*given: Any, **how: Any) -> Iterator[None]:
        try:
            yield
        finally:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")

    def work() -> None:
        raise torch.OutOfMemoryError("CUDA out of memory (in a test)")

    monkeypatch.setattr(torch.cuda, "graph", graph)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    with pytest.raises(RuntimeError, match=r"CUDA does not record it: CUDA out of memory \(in a test\)") as found:
        record(work)
    assert is_out_of_memory(found.value) and streams == [torch.cuda.current_stream()]
