"""What a check is: a function that gives figures, or says what is wrong. `doctor --gpu` and the tests call the same ones."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from posttrain.devices.out_of_memory import give_back
from posttrain.errors import first_line

Figures = dict[str, Any]
APART = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 5e-3}  # relative error that rounding may cause
LINES = 12  # of a traceback that a report keeps


class Wrong(Exception):
    """Something was computed, and it is not what it should be."""


class NotHere(Exception):
    """This machine lacks what the check is about; the message says what."""


@dataclass(frozen=True)
class Check:
    """name: as people read it. work: on this device; raises Wrong or NotHere, and whatever else it raises is wrong too. cards: so
    many CUDA cards are needed; 0: a CPU can do it. slow: it starts whole runs."""

    name: str
    work: Callable[[torch.device], Figures]
    cards: int = 0
    slow: bool = False


@dataclass(frozen=True)
class Found:
    """What became of a check. says: why it is wrong, or not here. figures: numbers, for a report."""

    name: str
    outcome: Literal["ok", "wrong", "not here"]
    says: str = ""
    figures: Figures = field(default_factory=dict[str, Any])
    seconds: float = 0.0
    trace: str = ""


def run_check(check: Check, device: torch.device, cards: int) -> Found:
    """Never raises: a check that fails in whatever way is wrong. cards: that this machine has."""
    if check.cards > cards:
        return Found(check.name, "not here", "needs CUDA" if check.cards == 1 else f"needs {check.cards} CUDA cards")
    began = time.perf_counter()
    try:
        figures = check.work(device)
    except NotHere as error:
        return Found(check.name, "not here", str(error))
    except Wrong as error:
        return Found(check.name, "wrong", str(error), seconds=time.perf_counter() - began)
    except Exception as error:
        trace = "\n".join(traceback.format_exc().splitlines()[-LINES:])
        return Found(check.name, "wrong", f"fails: {first_line(error)}", seconds=time.perf_counter() - began, trace=trace)
    finally:
        give_back()
    return Found(check.name, "ok", figures=figures, seconds=time.perf_counter() - began)


def within(errors: dict[str, float], most: float) -> Figures:
    """The errors as figures. Raises Wrong, naming those that are beyond `most`."""
    if beyond := [f"{name} {error:.1e}" for name, error in errors.items() if not error <= most]:
        raise Wrong(f"relative error above {most:.0e}: {', '.join(beyond)}")
    return {"relative_errors": errors}


def numbers(*shapes: Iterable[int], seed: int = 0) -> list[Tensor]:
    """Random float32 on the CPU."""
    random = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=random) for shape in shapes]


def wait(device: torch.device) -> None:
    """Until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
