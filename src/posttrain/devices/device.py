"""The device that a run is on, or that `plan --device` asks about: one object, of which both take their rules."""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from posttrain.devices.cards import NAMES, Card, card_of
from posttrain.errors import UserError, did_you_mean

CONTEXT = 2**30  # bytes that CUDA, its libraries and the allocator's gaps take of a card beside a run's tensors
# Of the data sheet's rates, what training reaches: assumed, not measured here. Modelled so, LoRA of Llama 3 8B on an H100 is as
# fast as NeMo AutoModel says that it is there (12.5k tokens/s).
OF_PRODUCTS, OF_BYTES = 0.6, 0.85
OF_A_CPU = 0.7  # of a measured product; the rest of a step is not products
AMPERE = (8, 0)  # the first of NVIDIA's with bfloat16


class Rates(NamedTuple):
    """Operations of products, and bytes of memory read or written, a second, as a run reaches them."""

    products: float
    bytes: float

    def seconds(self, work: Iterable[tuple[float, float]]) -> float:
        """How long (operations, bytes), one after another, take: each as long as the slower of the two."""
        return sum(max(operations / self.products, moved / self.bytes) for operations, moved in work)


@dataclass(frozen=True)
class Device:
    """kind: as torch calls it: cuda (also of AMD's cards), cpu, mps. memory: bytes that it shows; of a CPU, what is free to take.
    capability: of a CUDA card. card: what the data sheet says of it, where it is known. asked: is it planned for, by --device?"""

    kind: str
    name: str
    memory: float
    capability: tuple[int, int] | None = None
    card: Card | None = None
    asked: bool = False

    @classmethod
    def here(cls, index: int = 0) -> Device:
        """The card of this number, else this machine itself."""
        if torch.cuda.is_available():
            found = torch.cuda.get_device_properties(index)
            card = card_of(found.name, found.total_memory)
            return cls("cuda", found.name, float(found.total_memory), (found.major, found.minor), card)
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return cls(kind.type if kind else "cpu", "this machine's memory", float(_memory_here()))

    @classmethod
    def at(cls, place: torch.device) -> Device:
        """Where a run's tensors are."""
        return cls.here(place.index or 0) if place.type == "cuda" else cls(place.type, "this machine", float(_memory_here()))

    @classmethod
    def named(cls, name: str) -> Device:
        """A card of the table. Raises UserError, with a near name."""
        wanted = name.lower().replace("_", "-").removeprefix("rtx").removeprefix("-")
        if wanted not in NAMES:
            raise UserError(f"--device: there is no '{name}'{did_you_mean(wanted, list(NAMES))} (there are: {', '.join(NAMES)})")
        card = NAMES[wanted]
        return cls("cuda", card.title, card.bytes, card.capability, card, asked=True)

    def with_memory(self, size: float) -> Device:
        """The same, where a run may take so many bytes."""
        return replace(self, memory=size + (CONTEXT if self.kind == "cuda" else 0), name=f"{size / 1e9:.1f} GB, as asked for")

    @property
    def capacity(self) -> float:
        """Bytes that a run's tensors may take."""
        return self.memory - (CONTEXT if self.kind == "cuda" else 0)

    @property
    def has_bfloat16(self) -> bool:
        """Does it compute products in bfloat16? torch says so of every card: it lets older ones do it by way of float32."""
        if self.kind != "cuda" or self.capability is None or torch.version.hip or (self.card and self.card.vendor == "amd"):
            return True
        return self.capability >= AMPERE

    def rates(self, dtype: str) -> Rates | None:
        """Of products in this precision, tf32 among them; None for a card that no row is of."""
        if self.kind == "cuda":
            return self.card and _rates(self.card, dtype)
        return Rates(OF_A_CPU * _products_here("float32" if dtype == "tf32" else dtype), math.inf)


@lru_cache
def _products_here(dtype: str) -> float:
    """Operations a second of a product of matrices on this machine's CPU, measured for a fifth of a second."""
    side = 768
    a = torch.ones(side, side, dtype=getattr(torch, dtype))
    _ = a @ a
    began, done = time.perf_counter(), 0
    while time.perf_counter() - began < 0.2:
        _ = a @ a
        done += 1
    return 2 * side**3 * done / (time.perf_counter() - began)


def _rates(card: Card, dtype: str) -> Rates:
    peak = {"float32": card.single, "tf32": card.tf32 or card.single}.get(dtype, card.half)
    return Rates(peak * 1e12 * OF_PRODUCTS, card.bandwidth * 1e9 * OF_BYTES)


def _memory_here() -> int:
    """Bytes of this machine's memory that are free to take."""
    try:
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(encoding="utf-8"))
        return int(found[1] if found else 0) * 1024
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
