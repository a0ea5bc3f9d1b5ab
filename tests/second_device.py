"""A second device, in Python, on a CPU: it computes what the CPU does, and refuses tensors that lie elsewhere, as a card does.

torch's own interface for devices written in Python, which is experimental: `python -m tests.second_device STAGE SETTING...` is a
run on it, in a process of its own.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "card"
COPIES = ("_to_copy", "copy_", "_copy_from", "_copy_from_and_resize")
LOOKS_UP = ("index", "index_put", "index_put_", "_index_put_impl_")  # of a tensor there, also by indices from the CPU
WITH_A_NUMBER = ("fill_", "masked_fill", "masked_fill_", "where", *LOOKS_UP)  # beside operations element by element
OF_THE_HOST = ("_local_scalar_dense", "equal", "is_same_size")


class There(torch.Tensor):
    """A tensor of that device. here: its numbers."""

    here: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, here: torch.Tensor) -> There:
        made: Any = torch.Tensor._make_wrapper_subclass(  # pyright: ignore
            cls, here.shape, strides=here.stride(), storage_offset=here.storage_offset(), dtype=here.dtype,
            layout=here.layout, device=torch.device(NAME, 0), requires_grad=False,
        )  # fmt: skip
        made.here = here
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return computed(func, *args, **(kwargs or {}))

    def tolist(self) -> Any:
        return self.here.tolist()

    def data_ptr(self) -> int:
        return self.here.data_ptr()


def computed(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operator that has something to do with the device. RuntimeError for tensors of both."""
    name, (flat, spec) = func._schema.name.split("::")[1], tree_flatten((args, kwargs))
    there = [x for x in flat if isinstance(x, There)]
    takes_number = torch.Tag.pointwise in func.tags or name in WITH_A_NUMBER
    others = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, There) and (x.dim() or not takes_number)]
    if there and others and name not in COPIES and not (name in LOOKS_UP and isinstance(args[0], There)):
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but got tensors is on cpu, different from {NAME}:0 ({name})"
        )
    device = kwargs.get("device")
    is_there = bool(there) if device is None else torch.device(device).type == NAME
    plain = [x.here if isinstance(x, There) else torch.device("cpu") if isinstance(x, torch.device) else x for x in flat]
    on_cpu, named = tree_unflatten(plain, spec)
    if name == "_copy_from":  # from the first to the second
        on_cpu[1].copy_(on_cpu[0])
        return args[1]
    found = func(*on_cpu, **named)
    if "empty" in name:
        found.zero_()
    if name in OF_THE_HOST or not is_there:
        return found
    known = {id(x.here): x for x in there}
    return tree_map(lambda x: known.get(id(x), x) if id(x) in known or not isinstance(x, torch.Tensor) else There(x), found)


class _Module(_DummyBackendModule):
    """What torch asks a device for: random numbers are the CPU's."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None:
        pass


def register() -> Any:
    """Make the device known to torch for the rest of this process. To be kept."""
    _setup_privateuseone_for_python_backend(NAME, _Module())
    library = torch.library.Library("_", "IMPL")
    library.fallback(computed, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)
    for name in ("tensor", "as_tensor"):  # which torch makes behind the dispatcher's back
        setattr(torch, name, _moved(getattr(torch, name)))
    return library


def _moved(own: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    def make(data: Any, *args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return own(data, *args, device=device, **kwargs)
        return own(data, *args, **kwargs).to(device)

    return make


def _have_runs_there() -> None:
    import accelerate

    accelerate.Accelerator.device = property(lambda self: torch.device(NAME, 0))  # pyright: ignore
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("posttrain") and hasattr(module, "device_here"):
            module.device_here = lambda: NAME  # pyright: ignore


def main(stage: str, *words: str) -> None:
    from posttrain.config.compose import compose_run
    from posttrain.launch.worker import run_config

    kept = register()
    config = compose_run(stage, list(words))
    _have_runs_there()
    run_config(config)
    del kept


if __name__ == "__main__":
    main(*sys.argv[1:])
