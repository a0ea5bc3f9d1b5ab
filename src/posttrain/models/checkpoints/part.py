"""Some of a checkpoint's weights: the others are there in name and shape alone, and stay so on their way into the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

Wanted = Callable[[str], bool]  # a weight's name in the model -> is it to be read?


class Absent(Tensor):
    """Of the meta device, wherever it is sent."""

    def to(self, *_: Any, **__: Any) -> Absent:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Itself."""
        return self


@dataclass(frozen=True)
class _Named:
    """In the place of a slice of safetensors."""

    found: Any

    def get_shape(self) -> list[int]:
        return self.found.get_shape()

    def get_dtype(self) -> str:
        return self.found.get_dtype()

    def __getitem__(self, _: Any) -> Tensor:
        return torch.empty(self.get_shape(), device="meta").as_subclass(Absent)


def names_in_model(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """By the name of each weight in its files, the first of those in the model that are made of it."""
    mapping = get_model_conversion_mapping(model)
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    state = model.state_dict()
    return {
        name: rename_source_key(name, renamings, converters, model.base_model_prefix, state)[0]
        for name in sorted(names, key=dot_natural_key)  # the order in which transformers does it
    }


def in_part(state: Mapping[str, Any], targets: Mapping[str, str], wanted: Wanted) -> dict[str, Any]:
    """A state (checkpoints/files.py) of which only what is wanted is read. targets: as `names_in_model` gives them."""
    return {name: value if wanted(targets[name]) else _Named(value) for name, value in state.items()}
