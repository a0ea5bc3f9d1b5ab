"""A layer's frozen tensors as names and bytes, and back: plain weights, and those in 4 bits with the constants beside them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor, nn

from posttrain.models.quantization.experts import In4Bits
from posttrain.models.quantization.packed import packed_of, read_through, stored

OF = "|"  # between a weight's name and that of a part of its quantization
LARGE = ("absmax", "nested_absmax")  # of the parts of a quantization, those that grow with the weight


def frozen_tensors(layer: nn.Module) -> dict[str, Tensor]:
    """All that its checkpoint gives it, by names within it; what quantizes a weight stands behind it."""
    found: dict[str, Tensor] = {}
    for name, module, own in _places(layer):
        if own in module._buffers:
            found[name] = module._buffers[own]  # pyright: ignore[reportArgumentType]
            continue
        weight = stored(module, own)
        found[name] = weight.detach()
        if state := _state(module, own):
            found |= {f"{name}{OF}{part}": value for part, value in state.as_dict(packed=True).items()}
    return found


Ask = Callable[[], Tensor]  # for a tensor of a layer: peft may put another object in its place at any time


def put_in(layer: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Ask]:
    """Give a layer of the meta device what `frozen_tensors` has said of it.

    Returns those tensors of the layer that take memory, by the names of what lies in them: an assignment to `data` is enough to
    put them elsewhere.
    """
    found: dict[str, Ask] = {}
    for name in [name for name in tensors if OF not in name]:
        path, _, own = name.rpartition(".")
        module, value = layer.get_submodule(path), tensors[name]
        # the small ones stay: a view would keep all of the file mapped
        parts = {key.partition(OF)[2]: each for key, each in tensors.items() if key.startswith(name + OF)}
        parts = {key: each if key in LARGE else each.clone() for key, each in parts.items()}
        if not parts:
            found[name] = _plain(module, own, value)
            continue
        _in_4_bits(module, own, value, parts)
        found |= {name: partial(stored, module, own), f"{name}{OF}absmax": partial(_absmax, module, own)}
        if "nested_absmax" in parts:
            found[f"{name}{OF}nested_absmax"] = partial(_nested_absmax, module, own)
    return found


def _places(layer: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(name within the layer, module, name within the module)."""
    for path, module in layer.named_modules():
        if "parametrizations" in path.split("."):
            continue
        saved = [own for own in module._buffers if own not in module._non_persistent_buffers_set]
        for own in (*module._parameters, *getattr(module, "parametrizations", {}), *saved):
            if module._parameters.get(own, module) is not None and module._buffers.get(own, module) is not None:
                yield f"{path}.{own}".lstrip("."), module, own


def _state(module: nn.Module, own: str) -> Any:
    packed = packed_of(module, own)
    return packed.state if isinstance(packed, In4Bits) else getattr(stored(module, own), "quant_state", None)


def _absmax(module: nn.Module, own: str) -> Tensor:
    return _state(module, own).absmax


def _nested_absmax(module: nn.Module, own: str) -> Tensor:
    return _state(module, own).state2.absmax


def _plain(module: nn.Module, own: str, value: Tensor) -> Ask:
    if own in module._buffers:
        module._buffers[own] = value
    else:
        module._parameters[own] = nn.Parameter(value, requires_grad=False)
    return partial(getattr, module, own)


def _in_4_bits(module: Any, own: str, value: Tensor, parts: dict[str, Tensor]) -> None:
    from bitsandbytes.functional import QuantState
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    device: Any = value.device
    if isinstance(module, Linear4bit):
        module._parameters[own] = Params4bit.from_prequantized(value, parts, requires_grad=False, device=device, module=module)
        return
    module._parameters[own] = nn.Parameter(value, requires_grad=False)
    read_through(module, own, In4Bits(QuantState.from_dict(parts, device)))
