"""What a reward function has given, as a list: it may be a generator, asynchronous, or a list of what has to be awaited."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Coroutine, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from typing import Any


class NoScores(Exception):
    """It is nothing that has a score for each answer in their order."""


def listed(found: Any) -> list[Any]:
    """A score for each answer, whatever way it came. Raises NoScores."""
    if inspect.isawaitable(found) or hasattr(found, "__aiter__"):
        return _waited_for(_settled(found))
    values = _in_order(found)
    return _waited_for(_settled(values)) if any(map(inspect.isawaitable, values)) else values


def _waited_for(work: Coroutine[Any, Any, list[Any]]) -> list[Any]:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return asyncio.run(work)
    with ThreadPoolExecutor(1) as apart:  # a notebook has a loop at work in this thread, beside which none may run
        return apart.submit(asyncio.run, work).result()


async def _settled(found: Any) -> list[Any]:
    if inspect.isawaitable(found):
        found = await found
    values = [each async for each in found] if hasattr(found, "__aiter__") else _in_order(found)
    return list(await asyncio.gather(*(_value(each) for each in values)))


async def _value(each: Any) -> Any:
    return await each if inspect.isawaitable(each) else each


def _in_order(found: Any) -> list[Any]:
    if isinstance(found, str | bytes | Mapping | Set) or not isinstance(found, Iterable):
        said = " ".join(repr(found)[:60].split())
        raise NoScores(f"gave {said}; it must give a list: a number for each answer, or None where it does not apply")
    return list(found)
