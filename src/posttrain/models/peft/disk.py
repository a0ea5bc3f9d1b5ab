"""Weights of a model in memory, under the names and in the pieces in which its files hold them.

transformers joins what files hold apart (the experts of a layer) and renames what older files call otherwise. It can do all that
backwards, to save a model; the same is done here with a layer's new weights, or with what is to be added to them: pieces of a sum
are sums of pieces.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion
from transformers.pytorch_utils import Conv1D

from posttrain.errors import RunError


class OnDisk:
    """model: of `skeleton`. names: of all tensors on disk. group: of each, the layer whose weights are converted together;
    '' for what is in none."""

    def __init__(self, model: Any, names: Iterable[str]) -> None:
        self.model, self.names = model, set(names)
        held = model.state_dict(keep_vars=True)
        self.state: dict[str, Tensor] = {name: tensor.detach() for name, tensor in held.items()}
        self.members: dict[str, list[str]] = {}
        for name in self.state:
            self.members.setdefault(group_of(name), []).append(name)
        shapes = {group: self._reverted({name: self.state[name] for name in names}) for group, names in self.members.items()}
        self.group = {name: group for group, found in shapes.items() for name in found}
        self.shapes = {name: tuple(tensor.shape) for found in shapes.values() for name, tensor in found.items()}
        self.first = _first_names(held, lambda name: self.renamed(name) in self.names)

    def _reverted(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        return {self._there(name): piece for name, piece in revert_weight_conversion(self.model, weights).items()}

    def _alone(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """As `_reverted`; {} where a conversion asks for more weights than these."""
        try:
            return self._reverted(dict(weights))
        except ValueError:
            return {}

    def _there(self, name: str) -> str:
        """A bare checkpoint leaves the model's own prefix off its names, and a bare model is loaded from files that have it."""
        prefix = self.model.base_model_prefix
        tries = (name, name.removeprefix(f"{prefix}."), f"{prefix}.{name}")
        return next((tried for tried in tries if tried in self.names), name)

    def parameter(self, layer: str) -> str:
        """The full name of what an adapter's layer changes, of several that mean one the one on disk. Raises RunError for what is
        not there."""
        return self.first[_first((layer, f"{layer}.weight"), self.state, layer)]

    def renamed(self, parameter: str) -> str | None:
        """Its name on disk, where it lies there as it is in memory."""
        weight = self.state[parameter]
        found = self._alone({parameter: weight})
        return next((name for name, tensor in found.items() if len(found) == 1 and tensor is weight and name in self.group), None)

    def pieces(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Some weights of one group, float32, as they lie on disk; what shares a piece with them counts as zero."""
        found = self._alone(weights)
        if found and all(self.shapes.get(name) == tuple(piece.shape) for name, piece in found.items()):
            return found
        group = group_of(next(iter(weights)))
        rest = {name: torch.zeros(self.state[name].shape) for name in self.members[group] if name not in weights}
        touched = self._reverted({n: torch.zeros(t.shape) for n, t in weights.items()} | {n: t + 1 for n, t in rest.items()})
        return {n: piece for n, piece in self._reverted(rest | weights).items() if not bool(touched[n].all())}

    def is_transposed(self, parameter: str) -> bool:
        """Whether a matrix stands in it as [in, out], as GPT-2's and gpt-oss's do."""
        module: nn.Module = self.model.get_submodule(parameter.rpartition(".")[0])
        return isinstance(module, Conv1D) or (self.state[parameter].ndim == 3 and bool(getattr(module, "is_transposed", False)))


def group_of(name: str) -> str:
    """What of a name stands up to its first number: a layer's."""
    found = re.match(r"(.*?\.\d+)\.", name)
    return found[1] if found else ""


def _first_names(held: dict[str, Tensor], is_on_disk: Callable[[str], bool]) -> dict[str, str]:
    """Of every name the one by which its parameter is written down: layers may share one, and a file has it under one name."""
    same: dict[int, list[str]] = {}
    for name, tensor in held.items():
        same.setdefault(id(tensor), []).append(name)
    chosen = [(names, next(filter(is_on_disk, names), names[0]) if names[1:] else names[0]) for names in same.values()]
    return {name: first for names, first in chosen for name in names}


def _first(names: Iterable[str], there: Collection[str], layer: str) -> str:
    found = next((name for name in names if name in there), None)
    if found is None:
        raise RunError(f"the base's files have no weight for {layer}, which the adapter changes")
    return found


class Plain:
    """As `OnDisk`, for a model that transformers has no class for: names on disk are those in memory, or lack the first part."""

    def __init__(self, names: Iterable[str]) -> None:
        self.group = dict.fromkeys(names, "")

    def parameter(self, layer: str) -> str:
        """See `OnDisk`."""
        wanted = f"{layer}.weight"
        return _first((wanted, wanted.partition(".")[2]), self.group, layer)

    def renamed(self, parameter: str) -> str | None:
        """See `OnDisk`."""
        return parameter

    def pieces(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """See `OnDisk`."""
        return weights

    def is_transposed(self, parameter: str) -> bool | None:
        """Not known here."""
        return None
