"""Functions of whoever runs a stage from Python, which are told its metrics."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

from posttrain.errors import RunError, UserError

Listener = Callable[[int, dict[str, float]], None]  # a step, its metrics
_LISTENERS: ContextVar[tuple[Listener, ...]] = ContextVar("listeners", default=())


@contextmanager
def listening(listeners: Sequence[Listener]) -> Generator[None]:
    """Inside, `listeners` are told every line of metrics of this process's runs. Raises UserError for what is no function."""
    if not isinstance(listeners, list | tuple):
        raise UserError("callbacks: give a list of functions (step, metrics), as callbacks=[print]")
    if odd := [each for each in listeners if not callable(each)]:
        raise UserError(f"callbacks: {odd[0]!r} is no function (step, metrics)")
    token = _LISTENERS.set(tuple(listeners))
    try:
        yield
    finally:
        _LISTENERS.reset(token)


def tell(step: int, values: dict[str, float]) -> None:
    """Tell them all, each its own copy. Raises RunError where one raises."""
    for listener in _LISTENERS.get():
        try:
            listener(step, dict(values))
        except Exception as error:
            name = getattr(listener, "__name__", type(listener).__name__)
            raise RunError(f"callback {name}, told of step {step}: {type(error).__name__}: {error}") from error
