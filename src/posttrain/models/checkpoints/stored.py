"""A checkpoint's weights in a model that is made for another number format: as they lie in their files, mapped and not copied.

Processes of a machine share those pages. What the model computes for itself (rotary tables, scales) is in the format that was
asked for; weights are to be cast before they compute, a layer at a time (`training/sharding.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


class Stored(Tensor):
    """Stays as it is, in whichever format it is asked for."""

    def to(self, *_: Any, **__: Any) -> Stored:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Itself."""
        return self


@dataclass(frozen=True)
class _Slice:
    """In the place of a slice of safetensors."""

    found: Any

    def get_shape(self) -> list[int]:
        return self.found.get_shape()

    def get_dtype(self) -> str:
        return self.found.get_dtype()

    def __getitem__(self, place: Any) -> Tensor:
        return self.found[place].as_subclass(Stored)


def as_stored(state: Mapping[str, Any]) -> dict[str, Any]:
    """A state (checkpoints/files.py) whose weights keep their format on their way into a model."""
    return {name: _Slice(value) for name, value in state.items()}


def settle_stored(model: nn.Module) -> None:
    """Make plain parameters and buffers of what has arrived; what was tied stays so."""
    made: dict[int, Tensor] = {}
    for module in model.modules():
        for held in (module._parameters, module._buffers):
            for name, value in held.items():
                if isinstance(value, Stored):
                    plain = value.detach().as_subclass(Tensor)
                    fresh = nn.Parameter(plain, value.requires_grad) if held is module._parameters else plain
                    held[name] = made.setdefault(id(value), fresh)  # pyright: ignore[reportArgumentType]
