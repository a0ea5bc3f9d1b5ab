"""The layers of a base, each in a file of its own, as they are in memory: in 16 bits, or in 4.

They are made a layer at a time, so the whole model is never in memory, and kept in the cache.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.checkpoints.part import Wanted
from posttrain.models.offload.flat import Flat, read_index, write_flat, write_index
from posttrain.models.offload.held import Ask, frozen_tensors, put_in
from posttrain.runs.cache import cached_directory

INDEX = "index.json"
FORM = 1  # of the files


@dataclass(frozen=True)
class Streamed:
    """A layer, its file, and how to ask for its tensors that take memory, by their names in the file."""

    module: nn.Module
    flat: Flat
    tensors: Mapping[str, Ask]


def layer_names(model: nn.Module | None) -> list[str]:
    """The layers that can be recomputed, and so come and go. model: without values. Raises UserError where there are none."""
    named = model.named_modules() if model else ()
    found = [name for name, module in named if isinstance(module, GradientCheckpointingLayer)]
    if not found:
        raise UserError("train.offload: this model has no layers that can be recomputed; say train.offload=none")
    return found


def stored_layers(directory: Path, names: list[str], load: Callable[[Wanted], Any]) -> dict[str, Flat]:
    """The file of each layer, by its name; made where the cache has none. load: gives the model with those weights alone that are
    wanted, all others on the meta device."""

    def make(folder: Path) -> str:
        folder.mkdir()
        say(f"the base's {len(names)} layers are written to {directory}, once, layer by layer (train.offload=layers)")
        made = {name: _written(folder / f"{i:03}.bin", name, load) for i, name in enumerate(names)}
        write_index(folder / INDEX, made)
        return f"{len(names)} layers"

    folder, _ = cached_directory(directory, make)
    return read_index(folder / INDEX)


def _written(path: Path, name: str, load: Callable[[Wanted], Any]) -> Flat:
    model = load(lambda weight: weight.startswith(f"{name}."))
    flat = write_flat(path, frozen_tensors(model.get_submodule(name)))
    del model
    gc.collect()  # a model has circles, and would stay with the next one
    return flat


def put_layers(model: nn.Module, flats: Mapping[str, Flat]) -> list[Streamed]:
    """Give a model whose layers are on the meta device those of the files, mapped."""
    found: list[Streamed] = []
    for name, flat in flats.items():
        layer, mapped = model.get_submodule(name), flat.mapped()
        tensors = put_in(layer, {each: place.of(mapped) for each, place in flat.places.items()})
        found.append(Streamed(layer, flat, tensors))
    return found
