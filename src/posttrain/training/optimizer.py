"""The optimizer of a run, what it keeps, and how its learning rate goes. The optimizers themselves are files of optimizers/."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Generator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any, cast

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from posttrain.config.choices import OPTIMIZERS, RATE_GROUPS, Schedule
from posttrain.errors import UserError, did_you_mean, of_all
from posttrain.training.optimizers._kind import Instead, Kept, Settings


def make_optimizer(
    name: str, module: nn.Module, lr_ratio: Callable[[str], float],
    *, lr: float, betas: tuple[float, float] | None, eps: float | None, weight_decay: float,
    options: dict[str, Any] | None = None, kept: Kept | None = None,
) -> tuple[Optimizer, str | None]:  # fmt: skip
    """The optimizer, and a line to show when it is not the one that was asked for.

    bitsandbytes' 8-bit and paged AdamW exist on CUDA; elsewhere plain AdamW takes their place (see `in_place_of`). Weight decay
    leaves out vectors (norms, biases), as is usual. lr_ratio: parameter name -> its learning rate divided by the run's.
    kept: see `going_on`.
    """
    grouped: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    matrices = hidden_matrices(module) if OPTIMIZERS.get(name).whole_matrices else set[int]()
    for full_name, p in module.named_parameters():
        if p.requires_grad:
            key = (weight_decay if p.ndim >= 2 else 0.0, lr_ratio(full_name), id(p) in matrices)
            grouped.setdefault(key, []).append(p)
    groups = [
        {"params": ps, "weight_decay": decay, "lr_ratio": ratio, "is_matrix": is_matrix, "keeps": OPTIMIZERS.get(name).keeps}
        for (decay, ratio, is_matrix), ps in grouped.items()
    ]
    params = [p for group in grouped.values() for p in group]
    kind, numbers = params[0].device.type, sum(p.numel() for p in params)
    instead = in_place_of(name, numbers, kind == "cuda", any(isinstance(p, DTensor) for p in params))
    used, note = _used(name, instead)
    if kept and OPTIMIZERS.get(name).moments:
        used, note = going_on(name, instead, kept)
    if OPTIMIZERS.get(used).whole_matrices:
        note = _dealt(name, grouped)
    return OPTIMIZERS.get(used).make(groups, Settings(lr, betas, eps, options or {})), note


def _dealt(name: str, grouped: dict[tuple[float, float, bool], list[nn.Parameter]]) -> str:
    counts = {which: sum(p.numel() for key, ps in grouped.items() if key[2] is which for p in ps) for which in (True, False)}
    return (
        f"optim={name}: {counts[True]:,} numbers of hidden matrices learn by it, {counts[False]:,} others (embeddings, head, "
        f"vectors, fused experts) by AdamW"
    )


def make_moments(optimizer: Any) -> None:
    """Have all of AdamW's state now, as its first step would make it: then a step allocates nothing on CUDA, and cannot end half
    applied for want of memory. What is there already, of a checkpoint, stays. Other optimizers make theirs by themselves."""
    for part in getattr(optimizer, "parts", [optimizer]):
        for number, group in enumerate(part.param_groups):
            for position, p in enumerate(group["params"]):
                if part.state[p]:
                    continue
                if hasattr(part, "init_state"):  # bitsandbytes
                    part.init_state(group, p, number, position)
                elif issubclass(type(part), torch.optim.AdamW):
                    counter = torch.zeros((), dtype=torch.float32, device=p.device if group.get("fused") else "cpu")
                    slots = ("exp_avg", "exp_avg_sq")
                    moments = {slot: torch.zeros_like(p, memory_format=torch.preserve_format) for slot in slots}
                    part.state[p] = {"step": counter, **moments}


def hidden_matrices(module: nn.Module) -> set[int]:
    """Ids of the parameters that are matrices and neither an embedding's nor the output head's."""
    outside = set[int]()
    for each in module.modules():
        for part in (each if isinstance(each, nn.Embedding) else None, _head_of(each)):
            outside |= {id(p) for p in part.parameters()} if isinstance(part, nn.Module) else set()
    return {id(p) for p in module.parameters() if p.ndim == 2 and min(p.shape) > 1 and id(p) not in outside}


def _head_of(module: Any) -> Any:
    return module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None


def require_optimizer(name: str) -> None:
    """Raises UserError for an optimizer whose package is not installed."""
    package = OPTIMIZERS.get(name).package
    if package and not find_spec(package):
        raise UserError(f"optim.name: {name} needs the package {package}: pip install 'posttrain[optimizers]'")


def in_place_of(name: str, numbers: int, on_cuda: bool, sharded: bool = False) -> Instead | None:
    """Why plain AdamW takes the place of this optimizer; None where it does not. numbers: that are trained."""
    return OPTIMIZERS.get(name).instead(numbers, on_cuda, sharded)


def optimizer_used(name: str, numbers: int, kind: str, sharded: bool) -> tuple[str, str | None]:
    """What `optim.name` comes to for so many trained numbers on a device of this kind, as torch calls it, and a line where that
    is not what was asked for."""
    return _used(name, in_place_of(name, numbers, kind == "cuda", sharded))


def _used(name: str, instead: Instead | None) -> tuple[str, str | None]:
    return ("adamw", f"optim={name} {instead.why}; plain AdamW takes its place here") if instead else (name, None)


def going_on(name: str, instead: Instead | None, kept: Kept) -> tuple[str, str | None]:
    """As `optimizer_used`, for a run that goes on from a checkpoint: with the moments that it has. instead: as `in_place_of` has
    it. kept: whose those moments are.

    Raises UserError where this machine cannot go on with them."""
    used, note = _used(name, instead)
    if kept == "adamw":
        line = f"optim={name}: the run began with plain AdamW, whose moments are in its checkpoint, and goes on with it"
        return "adamw", note or (None if used == "adamw" else line)
    if used != "adamw" or (instead and instead.runs):
        return name, None
    raise of_all(
        UserError(
            f"run.dir: the checkpoint has the moments of bitsandbytes' optimizer, and {note or 'optim=adamw is asked for'}; go "
            "on where it began, or begin anew in another run.dir"
        )
    )


def state_bytes(used: str, module: nn.Module) -> float:
    """What the optimizer keeps for all that is trained of a module, on the meta device too. used: by `optimizer_used`."""
    kind, matrices = OPTIMIZERS.get(used), hidden_matrices(module)
    trained = {id(p): p for p in module.parameters() if p.requires_grad}
    return sum(kind.state_bytes(p.shape, p.element_size(), key in matrices) for key, p in trained.items())


def plain_optimizer(optimizer: Any) -> Any:
    """The optimizer within accelerate's."""
    return getattr(optimizer, "optimizer", optimizer)


@contextmanager
def as_left(optimizer: Any) -> Generator[None]:
    """Inside, the weights are those that a run would leave now. Those under training come back, to the bit."""
    plain = plain_optimizer(optimizer)
    if not hasattr(plain, "eval"):
        yield
        return
    params = [p for group in plain.param_groups for p in group["params"]]
    kept = [p.detach().clone() for p in params]
    plain.eval()
    try:
        yield
    finally:
        plain.train()
        with torch.no_grad():
            for p, value in zip(params, kept, strict=True):
                p.copy_(value)


def leave(optimizer: Any) -> None:
    """Training is over: the weights are what it leaves."""
    plain = plain_optimizer(optimizer)
    if hasattr(plain, "eval"):
        plain.eval()


def group_rates(
    module: nn.Module, own: Callable[[str], float], lr: float, groups: dict[str, float] | None
) -> Callable[[str], float]:
    """Parameter name -> its rate divided by the run's: by `optim.lr_groups`, times what the method says (`own`).

    Raises UserError for a group that nothing trained is of.
    """
    trained = [name for name, p in module.named_parameters() if p.requires_grad]
    ratios = dict[str, float]()
    for group, rate in (groups or {}).items():
        found = [name for name in trained if _is_of(module, group)(name)]
        if not found:
            parts = sorted({part for name in trained for part in name.split(".") if not part.isdigit()})
            raise UserError(
                f"optim.lr_groups: nothing that is trained is of '{group}'{did_you_mean(group, parts)}; a tied head is the "
                "embedding; leave it out"
            )
        ratios |= {name: rate / lr for name in found if name not in ratios}
    return lambda name: ratios.get(name, 1.0) * own(name)


def _is_of(module: nn.Module, group: str) -> Callable[[str], bool]:
    """Of embeddings, head, experts, or what a regular expression finds in a parameter's name."""
    if group == "experts":
        return lambda name: "experts" in name.split(".")
    if group not in RATE_GROUPS:
        return lambda name: re.search(group, name) is not None
    modules: dict[str, nn.Module] = dict(cast("Any", module).named_modules())
    if group == "embeddings":
        places = [name for name, each in modules.items() if isinstance(each, nn.Embedding)]
    else:
        heads = {id(_head_of(each)) for each in modules.values()}
        places = [name for name, each in modules.items() if id(each) in heads]
    return lambda name: any(name.startswith(f"{place}.") for place in places)


def lr_factor(
    schedule: Schedule, step: int, num_steps: int, warmup_steps: int, least: float = 0.0, decay_steps: int = 0
) -> float:
    """Factor on the learning rate of optimizer step `step` (from 0): a pure function, so resuming needs no state.

    Warm-up is linear and its first step is not zero. linear, cosine and, over its last `decay_steps`, wsd (Hu et al. 2024, arXiv
    2404.06395) fall to `least` of the rate, which they reach one step after the last.
    """
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if schedule == "constant":
        return 1.0
    begin = max(warmup_steps, num_steps - decay_steps) if schedule == "wsd" else warmup_steps
    done = max(0, step - begin) / max(1, num_steps - begin)
    left = 0.5 * (1.0 + math.cos(math.pi * done)) if schedule == "cosine" else 1.0 - done
    return least + (1.0 - least) * left
