"""How peft names what lies on parameters that are no layers of their own, in memory and in files.

peft wraps the module that owns such a parameter, once for each of its parameters: the last of them in the order of definition
lies outside, the one before it under `base_layer`, and so on. A file's `target_parameters` are kept in that order.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from posttrain.models.layers import own_shapes
from posttrain.models.peft.places import BASE, PREFIX, as_read, places_read, places_written
from posttrain.models.peft.targets import module_names, suffixes


@contextmanager
def todays_names() -> Iterator[None]:
    """Inside, peft takes names for the model's own, a file's too, and full ones of parameters.

    It takes some (gate_proj, up_proj, down_proj in a model with experts) for those of transformers 4 and puts LoRA on other
    parameters; and it finds no parameter of a quantized module that has an adapter already.
    """
    from peft.tuners.tuners_utils import BaseTuner
    from peft.utils import transformers_weight_conversion as conversion

    kept = conversion.convert_peft_config_for_transformers, BaseTuner._inject_parameters
    reads = conversion.convert_peft_adapter_state_dict_for_transformers
    conversion.convert_peft_config_for_transformers = lambda *args, **kwargs: None
    conversion.convert_peft_adapter_state_dict_for_transformers = _as_they_are
    BaseTuner._inject_parameters = _inject  # pyright: ignore
    try:
        yield
    finally:
        conversion.convert_peft_config_for_transformers, BaseTuner._inject_parameters = kept
        conversion.convert_peft_adapter_state_dict_for_transformers = reads


def _as_they_are(model: Any, peft_config: Any, adapter_state_dict: dict[str, Tensor], **_: Any) -> dict[str, Tensor]:
    return adapter_state_dict


def _inject(self: Any, peft_config: Any, model: nn.Module, adapter_name: str, **_: Any) -> list[str]:
    """peft's layers over the parameters of these full names, one after the other, or another adapter in those that are there."""
    for name in peft_config.target_parameters:
        module, _, parameter = name.rpartition(".")
        above, _, last = module.rpartition(".")
        parent = model.get_submodule(above)
        outer = there = getattr(parent, last)
        while getattr(there, "parameter_name", parameter) != parameter:
            there = there.base_layer
        wrapper = there if hasattr(there, "parameter_name") else outer
        self._create_and_replace(peft_config, adapter_name, wrapper, last, parent, current_key=name, parameter_name=parameter)
    return list(peft_config.target_parameters)


def renamed(model: Any, names: Iterable[str]) -> set[str]:
    """Those linear layers that plain peft would not find by their names in `target_modules`."""
    from peft import LoraConfig
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers

    def is_renamed(last: str) -> bool:
        config = LoraConfig(target_modules=[last])
        try:
            convert_peft_config_for_transformers(config, model, None)
        except ValueError:  # it asks for another one beside it
            return True
        return set(config.target_modules or ()) != {last}

    found = {last: is_renamed(last) for last in {name.rpartition(".")[2] for name in names}}
    return {name for name in names if found[name.rpartition(".")[2]]}


def misread(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those layers that plain peft, when it reads a LoRA's file, takes for others by what they are called in the model."""
    return {name for name, read in places_read(model, names).items() if read != name}


def unwritable(model: nn.Module, names: Iterable[str]) -> set[str]:
    """Those layers, or parameters by full name, that plain peft finds by no name in a LoRA's file."""
    modules = dict(model.named_modules())
    places = {name: name if name in modules else name.rpartition(".")[0] for name in names}
    written = places_written(model, places.values())
    return {name for name, place in places.items() if written[place] is None}


def file_targets(base: nn.Module, layers: Iterable[str], parameters: Iterable[str]) -> dict[str, list[str]]:
    """`target_modules` and `target_parameters` with which plain peft puts LoRA on exactly these.

    A linear layer that peft would not find by its name is a target by its weight: its tensors are the same.
    """
    layers = list(layers)
    odd = renamed(base, layers)
    asked = [*parameters, *(f"{name}.weight" for name in layers if name in odd)]
    every = parameter_names(base)
    order = {name: place for place, name in enumerate(every)}
    short = suffixes(asked, every, least=2)  # with the module's own name, by which a file is read
    first = {end: min(order[name] for name in asked if f".{name}".endswith(f".{end}")) for end in short}
    modules = suffixes([name for name in layers if name not in odd], module_names(base))
    return {"target_modules": modules, "target_parameters": sorted(short, key=first.__getitem__)}


def parameter_names(model: nn.Module) -> list[str]:
    """Full names of all parameters as a model without adapters or quantization has them, in the order of definition."""
    found = []
    for name, module in model.named_modules():
        if any(part.startswith("lora_") or part == "parametrizations" for part in name.split(".")):
            continue
        found += [f"{name.replace(BASE, '')}.{own}" for own in own_shapes(module)]
    return found


def key_of(parameter: str, targeted: Iterable[str], every: list[str]) -> str:
    """The part of a file's key that means a parameter. targeted: all parameters with an adapter; every: as `parameter_names`."""
    module = parameter.rpartition(".")[0]
    there = set(targeted)
    beside = [name for name in every if name in there and name.rpartition(".")[0] == module]
    return module + BASE * (len(beside) - 1 - beside.index(parameter))


def by_parameter(config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors (without peft's prefix) under the names of what they change: a module's for its `weight`, else the
    parameter's."""
    targets = list(config.get("target_parameters") or [])
    found: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        head, mark, tail = key.partition(".lora_")
        module = head.replace(BASE, "")
        own = [t.rpartition(".")[2] for t in targets if f".{module}".endswith(f".{t.rpartition('.')[0]}")]
        if not mark or not own or own == ["weight"]:
            found[key] = tensor
        else:
            found[f"{module}.{own[len(own) - 1 - head.count(BASE)]}{mark}{tail}"] = tensor
    return found


def with_layers(config: Any, model: nn.Module) -> Any:
    """peft's description of an adapter for a model in memory: full names of parameters, and linear layers by their own names, so
    that quantized ones are found too."""
    asked = list(getattr(config, "target_parameters", None) or [])
    if not asked:
        return config
    every = [name for name in parameter_names(model) if any(f".{name}".endswith(f".{target}") for target in asked)]
    linear = {name for name, module in model.named_modules() if hasattr(module, "in_features")}
    layers = [name.removesuffix(".weight") for name in every if name.removesuffix(".weight") in linear]
    config.target_parameters = [name for name in every if name.removesuffix(".weight") not in linear]
    config.target_modules = {*(config.target_modules or ()), *layers}
    # a pattern of a linear layer's weight is now one of the layer
    for patterns in (config.rank_pattern, config.alpha_pattern):
        for key in [key for key in patterns if re.sub(r"\\(.)", r"\1", key).removesuffix(".weight") in layers]:
            patterns[re.sub(r"\\?\.weight$", "", key)] = patterns.pop(key)
    return config


def in_memory(model: Any, config: dict[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """A file's tensors under the names that they have, without the adapter's own, on a model with such an adapter on it."""
    base = model.get_base_model()
    found = {key: tensor for key, tensor in tensors.items() if not key.startswith(PREFIX)}
    own = as_read(base, {key.removeprefix(PREFIX): tensor for key, tensor in tensors.items() if key not in found})
    if not config.get("target_parameters"):
        return found | {f"{PREFIX}{key}": tensor for key, tensor in own.items()}
    modules = dict(base.named_modules())
    for key, tensor in by_parameter(config, own).items():
        name, mark, tail = key.partition(".lora_")
        module, _, parameter = name.rpartition(".")
        place = module + _depth(modules[module], parameter) if mark and name not in modules else name
        found[f"{PREFIX}{place}{mark}{tail}"] = tensor
    return found


def _depth(wrapper: Any, parameter: str) -> str:
    place = ""
    while wrapper.parameter_name != parameter:
        wrapper, place = wrapper.base_layer, place + BASE
    return place
