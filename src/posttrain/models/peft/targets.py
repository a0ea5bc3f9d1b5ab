"""Which layers an adapter goes on, and which are left out, with the reason."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

from torch import nn
from transformers.pytorch_utils import Conv1D

from posttrain.errors import UserError
from posttrain.models.layers import Kind, Layer, layers_of
from posttrain.models.peft.shared import shared_weights


class Targets(NamedTuple):
    """layers: linear ones, by name. parameters: of fused experts and bare routers, by full name. left: a line for each kind of
    what the config asks for and an adapter is not put on."""

    layers: dict[str, Layer]
    parameters: dict[str, Layer]
    left: list[str]


class Limits(NamedTuple):
    """What a method can be put on. rank: what a layer must be as wide as, which is ranks_wide times the rank. renamed: which of
    some linear layers plain peft would not find again by name. writes_base: does it take a part out of a layer's weight?
    transposed: can it be put on layers that keep their weight as [in, out]? misfit: (in, out) -> why a layer that is wide enough
    cannot have it, or ''."""

    method: str
    rank: int = 1
    experts: bool = True
    router: bool = False
    on_parameters: bool = False
    renamed: Callable[[Iterable[str]], set[str]] = lambda names: set()
    writes_base: bool = False
    transposed: bool = True
    ranks_wide: int = 1
    misfit: Callable[[int, int], str] = lambda size_in, size_out: ""


def targets_of(model: nn.Module, targets: str | list[str], limits: Limits) -> Targets:
    """What `targets` (all-linear, names, or a regular expression over full names) means. UserError where nothing is left."""
    there = layers_of(model)
    found = _asked(there, targets)
    shared = shared_weights(there.values()) if limits.writes_base else set()
    reasons = _Reasons(limits, set(targets) if isinstance(targets, list) else set(), limits.renamed(found), shared)
    why = {name: reasons.of(layer) for name, layer in found.items()}
    kept = {name: layer for name, layer in found.items() if not why[name]}
    left = _lines(found, why)
    if not kept:
        raise UserError(_nothing_left(found, reasons, left))
    return Targets(
        {name: layer for name, layer in kept.items() if layer.module is not None},
        {name: layer for name, layer in kept.items() if layer.module is None},
        left,
    )


def _asked(there: dict[str, Layer], targets: str | list[str]) -> dict[str, Layer]:
    """Raises UserError for a name or a pattern that matches nothing."""
    if isinstance(targets, str):
        try:
            found = {n: layer for n, layer in there.items() if targets == "all-linear" or re.fullmatch(targets, n)}
        except re.error as error:
            raise UserError(f"peft.targets: '{targets}' is no regular expression ({error})") from error
        missing = [] if found else [targets]
    else:
        found = {n: layer for n, layer in there.items() if any(_named(layer, t) for t in targets)}
        missing = [t for t in targets if not any(_named(layer, t) for layer in there.values())]
    if missing or not found:
        kinds = ", ".join(sorted({layer.short for layer in there.values()}))
        raise UserError(f"peft.targets: no linear layer matches '{', '.join(missing)}'; this model has {kinds} (all-linear: all)")
    return found


def _named(layer: Layer, target: str) -> bool:
    names = (layer.name, layer.name.removesuffix(".weight")) if layer.module is None else (layer.name,)
    return any(f".{name}".endswith(f".{target}") for name in names)


class _Reasons:
    """Why an adapter is not put on a layer; '' where it is."""

    def __init__(self, limits: Limits, names: set[str], renamed: set[str], shared: set[str]) -> None:
        self.limits, self.names, self.renamed, self.shared = limits, names, renamed, shared

    def of(self, layer: Layer) -> str:
        limits = self.limits
        if layer.kind is Kind.TOWER:
            return "text does not run through them"
        if layer.kind is Kind.STATE:
            return "kernels of state-space layers read their weights past any adapter, or a low rank would break the state"
        if layer.kind is Kind.BELOW:
            return "they are read past any adapter of peft's"
        if layer.kind is Kind.EXPERTS and not limits.experts:
            return "peft.experts=false"
        if layer.kind is Kind.ROUTER and not limits.router and not any(_named(layer, name) for name in self.names):
            return "peft.router=true trains them"
        if layer.module is None and not limits.on_parameters:
            return f"peft={limits.method} cannot be put on them"
        if isinstance(layer.module, Conv1D) and not limits.transposed:
            return f"peft={limits.method} cannot be put on weights that are kept transposed"
        if layer.name in self.renamed:
            return f"plain peft takes their names for others, and would not load peft={limits.method} on them"
        if layer.name in self.shared:
            return f"peft={limits.method} would write into a weight that other layers share"
        if min(layer.shape) < limits.rank:
            times = f"{limits.ranks_wide} times the " if limits.ranks_wide > 1 else ""
            return f"narrower than {times}rank {limits.rank // limits.ranks_wide}"
        return limits.misfit(*layer.shape)


def _nothing_left(found: dict[str, Layer], reasons: _Reasons, left: list[str]) -> str:
    """The field to change is the rank where a lower one would leave a layer to train."""
    rank, reasons.limits = reasons.limits.rank, reasons.limits._replace(rank=1)
    widest = max((min(layer.shape) for layer in found.values() if not reasons.of(layer)), default=0)
    if highest := widest // (wide := reasons.limits.ranks_wide):
        side = "the smaller side" if wide == 1 else f"1/{wide} of the smaller side"
        return f"peft.r: {rank // wide} is above {side} of every layer that could be trained; {highest} is the highest"
    return f"peft.targets: nothing is left to train: {'; '.join(left)}"


def _lines(found: dict[str, Layer], why: dict[str, str]) -> list[str]:
    lines = []
    for reason in dict.fromkeys(filter(None, why.values())):
        left = [layer for name, layer in found.items() if why[name] == reason]
        kinds = " and ".join(sorted({layer.kind.value for layer in left}))
        names = ", ".join(sorted({layer.short for layer in left}))
        lines.append(f"no adapter on {len(left)} {kinds} ({names}): {reason}")
    return lines


def is_transposed(layers: dict[str, Layer]) -> bool:
    """Whether the layers keep their weight as [in, out], as GPT-2's do."""
    return bool(layers) and all(isinstance(layer.module, Conv1D) for layer in layers.values())


def suffixes(chosen: Iterable[str], every: Iterable[str], least: int = 1) -> list[str]:
    """The shortest names that mean exactly `chosen` among `every`: `least` last parts, or more where those reach others too."""
    wanted = set(chosen)
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(name.rpartition(".")[2], []).append(name)
    others = [name for name in every if name not in wanted and name.rpartition(".")[2] in groups]
    found: list[str] = []
    for last, names in groups.items():
        against = [name for name in others if name.rpartition(".")[2] == last]
        for length in range(least, 4):
            short = {".".join(name.split(".")[-length:]) for name in names}
            if not any(f".{name}".endswith(f".{end}") for name in against for end in short):
                found += short
                break
        else:
            found += names
    return sorted(found)


def linears(model: nn.Module) -> dict[str, nn.Module]:
    """The linear layers (quantized ones too) but for the output head."""
    return {name: layer.module for name, layer in layers_of(model).items() if layer.module is not None}


def module_names(model: nn.Module) -> list[str]:
    """As the model had them before any adapter."""
    return [name for name, _ in model.named_modules() if ".lora_" not in name and not name.endswith(".base_layer")]


def layer_options(targets: Targets, model: nn.Module) -> dict[str, Any]:
    """What every config of peft's is told of the layers to go on."""
    return {"target_modules": suffixes(targets.layers, module_names(model)), "fan_in_fan_out": is_transposed(targets.layers)}
