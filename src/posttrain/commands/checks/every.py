"""`posttrain doctor --gpu`: every check on this device, as a table and as JSON to attach to a report."""

from __future__ import annotations

import os
import platform
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE_HEAD
from rich.table import Table
from transformers.utils import logging

from posttrain.commands.checks.check import Check, Figures, Found, run_check
from posttrain.commands.checks.kernels import KERNEL_CHECKS
from posttrain.commands.checks.numbers import NUMBER_CHECKS
from posttrain.commands.checks.rates import RATE_CHECKS
from posttrain.commands.checks.runs import KILL_CHECK, RUN_CHECKS
from posttrain.console import Meter, console, say
from posttrain.devices.device import Device
from posttrain.devices.seen import remarks, seen
from posttrain.errors import RunError, UserError
from posttrain.launch import warm_worker
from posttrain.launch.worker import choose_allocator
from posttrain.models.language.loading import device_here
from posttrain.runs.files import write_json
from posttrain.runs.identity import code_state, library_versions

# what a stop should not take away comes early: the kill as soon as the kernels have given its workers the time to import
CHECKS: tuple[Check, ...] = (*KERNEL_CHECKS, KILL_CHECK, *NUMBER_CHECKS, *RATE_CHECKS, *RUN_CHECKS)


def check_device(to: Path | None, checks: tuple[Check, ...] = CHECKS) -> list[Found]:
    """Do every check here and show what came of it. to: a file for the report. Raises RunError where something is wrong, with the
    report written; UserError where it cannot be."""
    if to and not to.parent.is_dir():
        raise UserError(f"--json: there is no directory {to.parent}; make it, or give another file")
    choose_allocator()  # as a run does; and the environment of its workers is then this one, whatever runs here before
    if any(check.slow for check in checks):
        warm_worker.begin(dict(os.environ))
    device, found = torch.device(device_here()), list[Found]()
    cards = torch.cuda.device_count() if device.type == "cuda" else 0
    write = _writer(to, device, cards, found)
    logging.disable_progress_bar()
    with Meter("checks", len(checks)) as meter, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what the libraries say of a device: the table says it in figures
        try:
            for check in checks:
                write(check.name)
                found.append(run_check(check, device, cards))
                meter.advance(check.name)
        finally:
            warm_worker.close()
    write(None)
    _show(found)
    if to:
        say(f"report {to}")
    if wrong := [each.name for each in found if each.outcome == "wrong"]:
        raise RunError(f"wrong here: {', '.join(wrong)}; --json FILE writes what a report of it needs")
    return found


def _show(found: list[Found]) -> None:
    table = Table("check", "here", "figures", "s", box=SIMPLE_HEAD, pad_edge=False)
    for each in found:
        word = f"{each.outcome}: {each.says}" if each.says else each.outcome
        table.add_row(
            each.name, word, _in_words(each.figures), f"{each.seconds:.1f}", style="bold" if each.outcome == "wrong" else ""
        )
    console.print(table)


def _in_words(figures: Figures) -> str:
    """Numbers and the worst of several."""
    said: list[str] = []
    for name, value in figures.items():
        if isinstance(value, dict) and value:
            said.append(f"{name} up to {max(value.values()):.1e}")
        elif isinstance(value, int | float):
            said.append(f"{name} {value:,.4g}")
    return ", ".join(said)


def _writer(to: Path | None, device: torch.device, cards: int, found: list[Found]) -> Callable[[str | None], None]:
    """What writes the report, told the check that is next: before each one, so that whatever stops it takes no other's figures
    with it."""
    about, began = _about(device, cards) if to else {}, time.perf_counter()

    def write(at_work: str | None) -> None:
        if to:
            done = [asdict(each) for each in found]
            write_json(to, about | {"seconds": round(time.perf_counter() - began, 1), "at work": at_work, "checks": done})

    return write


def _about(device: torch.device, cards: int) -> dict[str, Any]:
    """What somebody else needs to know of where it ran; no name of this machine or of its user."""
    seen_now = [seen(Device.here(i), i) for i in range(cards)]
    return {
        "device": device.type,
        "cards": [{"name": each.name, "memory": each.memory, "free": each.free} for each in seen_now if each],
        "remarks": remarks(seen_now[:1]),
        "capability": [torch.cuda.get_device_capability(i) for i in range(cards)],
        "cuda": torch.version.cuda,
        "system": platform.platform(),
        "python": platform.python_version(),
        "libraries": library_versions(),
        "code": code_state(),
    }
