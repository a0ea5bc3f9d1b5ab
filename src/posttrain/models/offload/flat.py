"""Tensors one behind another in a file, which is mapped: what is not read takes no memory, and letting go of it is free."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ALIGNED = 64  # bytes, as torch's own allocator has it: products may round otherwise on other addresses


@dataclass(frozen=True)
class Place:
    """Where a tensor lies in a flat one of bytes. dtype: torch's name of it."""

    start: int
    dtype: str
    shape: tuple[int, ...]

    def of(self, flat: Tensor) -> Tensor:
        """The tensor itself, in the memory of `flat`; without autograd's note of that, which would hold it in memory."""
        dtype = getattr(torch, self.dtype)
        size = torch.Size(self.shape).numel() * dtype.itemsize
        return flat[self.start : self.start + size].view(dtype).view(self.shape).data


@dataclass(frozen=True)
class Flat:
    """A file of tensors, and where in it they are, by name."""

    path: Path
    size: int
    places: Mapping[str, Place]

    def mapped(self) -> Tensor:
        """All of it as uint8, mapped until nobody has a part of it any more. What is written into it reaches no file."""
        return torch.from_file(str(self.path), shared=False, size=self.size, dtype=torch.uint8)

    def record(self) -> dict[str, Any]:
        """As JSON holds it, but for the folder."""
        return {"file": self.path.name, "size": self.size, "places": {name: asdict(place) for name, place in self.places.items()}}


def write_flat(path: Path, tensors: Mapping[str, Tensor]) -> Flat:
    """Of any device. Raises OSError."""
    places: dict[str, Place] = {}
    with path.open("wb") as file:
        for name, tensor in tensors.items():
            file.write(bytes(-file.tell() % ALIGNED))
            places[name] = Place(file.tell(), str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            file.write(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
        size = file.tell()
    return Flat(path, size, places)


def write_index(path: Path, flats: Mapping[str, Flat]) -> None:
    """Of files in the same folder, each by a name of its own."""
    path.write_text(json.dumps({name: flat.record() for name, flat in flats.items()}), encoding="utf-8")


def read_index(path: Path) -> dict[str, Flat]:
    """As `write_index` has written it."""
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return {name: _flat(path.parent, each) for name, each in found.items()}


def _flat(folder: Path, told: dict[str, Any]) -> Flat:
    places = {name: Place(each["start"], each["dtype"], tuple(each["shape"])) for name, each in told["places"].items()}
    return Flat(folder / told["file"], told["size"], places)
