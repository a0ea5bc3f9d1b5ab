"""Where plain peft puts what a LoRA's file has: not always where the file says.

It reads a file as transformers reads a checkpoint of an older version, whose rules may take a name of today for an old one. What
it would put elsewhere is written under its name on disk, which the same rules lead to the right place.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

PREFIX, MARK, BASE = "base_model.model.", ".lora_", ".base_layer"


def places_read(model: Any, places: Iterable[str]) -> dict[str, str]:
    """By each place in a file, as names of the model's layers, the one where plain peft puts it."""
    as_said = dict[str, bool]()
    found = {}
    for place in places:
        kind = re.sub(r"\.\d+\.", ".0.", place)  # of the layers of one kind, one is tried
        if kind not in as_said:
            as_said[kind] = _read(model, place) == place
        found[place] = place if as_said[kind] else _read(model, place)
    return found


def places_written(model: Any, places: Iterable[str]) -> dict[str, str | None]:
    """By each place in the model the one in a file that plain peft puts there; None where there is none."""
    found = dict[str, str | None]()
    for place, read in places_read(model, places).items():
        written = place if read == place else _on_disk(model, place)
        found[place] = written if read == place or _read(model, written) == place else None
    return found


def as_read(model: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors, without peft's prefix, under the names of the layers that they are for."""
    there = {name.replace(BASE, "") for name, _ in model.named_modules()}
    read = places_read(model, sorted({key.partition(MARK)[0] for key in tensors if MARK in key}))
    found = {}
    for key, tensor in tensors.items():
        place, mark, end = key.partition(MARK)
        now = read.get(place, place)
        found[f"{now if now.replace(BASE, '') in there else place}{mark}{end}"] = tensor
    return found


def _read(model: Any, place: str) -> str:
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_adapter_state_dict_for_transformers

    config: Any = LoraConfig(target_modules=["any"])
    found = convert_peft_adapter_state_dict_for_transformers(model, config, {f"{PREFIX}{place}{MARK}A.weight": torch.zeros(1, 1)})
    return next(iter(found)).removeprefix(PREFIX).partition(MARK)[0]


def _on_disk(model: Any, place: str) -> str:
    return next(iter(revert_weight_conversion(model, {f"{place}{MARK}A.weight": torch.zeros(1, 1)}))).partition(MARK)[0]
