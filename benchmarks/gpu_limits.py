"""A card made smaller for a case of benchmarks/gpu.py, and the longest context that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from posttrain.commands.plan.need import largest
from posttrain.devices.device import CONTEXT
from posttrain.devices.out_of_memory import give_back
from posttrain.errors import is_out_of_memory

STEPS = 32  # of the longest context that is looked for: as fine as it is found


def share(gigabytes: float, total: float) -> float:
    """Of a card's bytes, those that a run has on a card of so many GB (10^9), where CUDA itself takes as much as `plan` leaves to
    it. SystemExit where there are no such."""
    found = (gigabytes * 1e9 - CONTEXT) / total
    if not 0 < found <= 1 - CONTEXT / total:
        raise SystemExit(
            f"--cap: {gigabytes:g} GB, and this card has {total / 1e9:.1f} GB, of which CUDA takes {CONTEXT / 1e9:.1f}"
        )
    return found


def cap(gigabytes: float) -> None:
    """Have torch's allocator say that it is out of memory where a card of so many GB would. SystemExit without CUDA."""
    if not torch.cuda.is_available():
        raise SystemExit("--cap: needs a CUDA card; leave it out")
    torch.cuda.set_per_process_memory_fraction(share(gigabytes, torch.cuda.get_device_properties(0).total_memory))


def free_bytes(gigabytes: float | None) -> float:
    """What may still be taken of the card, made smaller or not."""
    free, total = torch.cuda.mem_get_info()
    return free if gigabytes is None else min(free, share(gigabytes, total) * total - torch.cuda.memory_reserved())


def longest(step: Callable[[int], Any], forget: Callable[[], Any], most: int) -> int:
    """The longest context, in tokens, that a step of it fits into memory: up to `most`, in parts of a 32nd of it. forget: what a
    step that has failed may have left behind. Raises what is not about memory."""

    def fits(tokens: int) -> bool:
        try:
            step(tokens)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        else:
            return True
        forget()  # outside of the handler, where nothing holds what the failed step has kept
        give_back()
        return False

    return largest(fits, max(1, most // STEPS), most)
