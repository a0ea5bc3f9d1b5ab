"""What is done where memory is short outside of training's own steps: the same work in parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import distributed

from posttrain.console import say
from posttrain.errors import is_out_of_memory

Part = TypeVar("Part")
Found = TypeVar("Found")


def give_back() -> None:
    """Let go of what the allocator holds and no tensor uses; to be called outside of the handler of the error, whose traceback
    holds the tensors of the pass that failed."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


_SAID: set[str] = set()


def in_two(items: list[Part]) -> list[list[Part]]:
    """The halves of a list; itself alone where it has one item."""
    half = len(items) // 2
    return [part for part in (items[:half], items[half:]) if part]


def in_parts(work: Callable[[Part], Found], whole: Part, split: Callable[[Part], Sequence[Part]], what: str) -> list[Found]:
    """What `work` gives for the whole; where memory is short, for its parts in turn, which are split again where that is not
    enough. what: in the line that says so.

    Raises what `work` does for a part that cannot be split, and where several processes share the run: the others would wait.
    """
    try:
        return [work(whole)]
    except Exception as error:
        parts = split(whole)
        alone = not (distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1)
        if not alone or len(parts) < 2 or not is_out_of_memory(error):
            raise
    give_back()
    if what not in _SAID:
        _SAID.add(what)
        say(f"{what}: out of memory; in {len(parts)} parts, one after another, here and wherever it happens again")
    return [found for part in parts for found in in_parts(work, part, split, what)]
