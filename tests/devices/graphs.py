"""A stand-in of torch.cuda's graphs on a CPU: operators that are called while one is recorded are done again by `replay`, on the
very same tensors and into the same results, without any Python of the model. Recording leaves all numbers as they were, as CUDA's
does."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from posttrain.devices import recording
from posttrain.devices.host_waits import _asks


class Graph:
    """calls: operator, arguments and results. replays: how often it was replayed."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, Any, Any, Any]] = []
        self.replays = 0

    def replay(self) -> None:
        self.replays += 1
        for func, args, kwargs, results in self.calls:
            for own, new in zip(_tensors(results), _tensors(func(*args, **kwargs)), strict=True):
                if own.data_ptr() != new.data_ptr():  # neither a view nor in place
                    own.copy_(new)


class _Recording(TorchDispatchMode):
    def __init__(self, graph: Graph) -> None:
        super().__init__()
        self.graph, self.before = graph, list[tuple[Tensor, Tensor]]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _asks(func, args):
            raise RuntimeError("CUDA error: operation not permitted when stream is capturing")
        for argument, given in zip(func._schema.arguments, args, strict=False):
            if argument.alias_info is not None and argument.alias_info.is_write:
                self.before.append((given, given.clone()))
        results = func(*args, **(kwargs or {}))
        self.graph.calls.append((func, args, kwargs or {}, results))
        return results


@contextmanager
def _recorded(graph: Graph, **how: Any) -> Iterator[None]:
    with _Recording(graph) as recording:
        yield
    for tensor, numbers in reversed(recording.before):
        tensor.copy_(numbers)


def _tensors(tree: Any) -> list[Tensor]:
    return [x for x in tree_leaves(tree) if isinstance(x, Tensor)]


def stand_in(monkeypatch: pytest.MonkeyPatch) -> list[Graph]:
    """Put it in the place of torch.cuda's; returns the graphs that are made."""
    made: list[Graph] = []

    def make() -> Graph:
        made.append(Graph())
        return made[-1]

    stream: Any = SimpleNamespace(wait_stream=lambda _: None)
    own = {
        "CUDAGraph": make, "graph": _recorded, "current_stream": lambda: stream, "current_device": lambda: 0,
        "stream": lambda _: nullcontext(), "set_stream": lambda _: None,
    }  # fmt: skip
    for name, value in own.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(recording, "own_stream", lambda _: stream)
    return made
