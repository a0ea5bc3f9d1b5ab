"""The cards that a run's processes have, before anything is loaded: do they go together, and has anybody else taken them?"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Sequence
from typing import NamedTuple

import torch

from posttrain.devices.device import Device
from posttrain.errors import UserError, of_all

GIB = 2**30
BUSY = 0.1  # of a card's memory: less is a desktop's, or CUDA's own


class Seen(NamedTuple):
    """One process's card. free: bytes. others: of other processes on it, in words; '' where it is free, or they are not known."""

    where: str
    name: str
    memory: float
    free: float
    has_bfloat16: bool
    others: str = ""


def seen(device: Device, index: int) -> Seen | None:
    """What this process finds at its card of this number; None without CUDA."""
    if device.kind != "cuda":
        return None
    free, _ = torch.cuda.mem_get_info(index)
    where = f"{os.uname().nodename} " if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE") else ""
    busy = device.memory - free > BUSY * device.memory
    others = _others(getattr(torch.cuda.get_device_properties(index), "uuid", index)) if busy else ""
    return Seen(f"{where}gpu {index}", device.name, device.memory, float(free), device.has_bfloat16, others)


def remarks(cards: Sequence[Seen | None]) -> list[str]:
    """A line where the cards of a run's processes differ, and one for each that is busy.

    Raises UserError, the same in all processes, where they would not compute in one format, or some have no card.
    """
    found = [card for card in cards if card]
    if len(found) < len(cards) and found:
        raise of_all(UserError(f"train.processes: {len(found)} of {len(cards)} have a card ({_listed(found)}), the others none"))
    kinds = {card.name: card for card in found}
    if len({card.has_bfloat16 for card in found}) > 1:
        raise of_all(
            UserError(
                f"train.processes: the cards differ ({_listed(found)}), and not all of them compute bfloat16; choose alike ones "
                "with CUDA_VISIBLE_DEVICES"
            )
        )
    lines = [f"{card.where} ({card.name}) is busy: {_taken(card)}" for card in found if _is_busy(card)]
    if len(kinds) > 1:
        least = min(found, key=lambda card: card.memory)
        slowest = f"all wait for the slowest, and the smallest memory counts ({least.name}, {least.memory / GIB:.1f} GiB)"
        lines.insert(0, f"the cards differ ({_listed(found)}): {slowest}; CUDA_VISIBLE_DEVICES chooses alike ones")
    return lines


def _is_busy(card: Seen) -> bool:
    return card.memory - card.free > BUSY * card.memory


def _taken(card: Seen) -> str:
    by = card.others or "nvidia-smi does not say by whom"
    taken = (card.memory - card.free) / GIB
    return f"{taken:.1f} of {card.memory / GIB:.1f} GiB are taken ({by}), {card.free / GIB:.1f} are left for this run"


def _listed(cards: Sequence[Seen]) -> str:
    return ", ".join(f"{card.where} {card.name}" for card in cards)


def _others(card: object) -> str:
    """Of the processes on the card with this uuid: number, program and memory of each, as the driver's tool has them."""
    if not shutil.which("nvidia-smi"):
        return ""
    asked = ["nvidia-smi", "--query-compute-apps=gpu_uuid,pid,process_name,used_memory", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, timeout=20).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
    rows = [[part.strip() for part in line.split(",")] for line in said.splitlines() if line.count(",") == 3]
    return ", ".join(
        f"pid {pid} {os.path.basename(program)} {_gib(used)}"
        for uuid, pid, program, used in rows
        if uuid.endswith(str(card)) and pid != str(os.getpid())
    )


def _gib(mib: str) -> str:
    return f"{float(mib) / 1024:.1f} GiB" if mib.isdigit() else "of unknown size"
