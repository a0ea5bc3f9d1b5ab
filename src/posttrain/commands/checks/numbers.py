"""Four and eight bits, and optimizers, on this device: against float32 on the CPU, and through a checkpoint."""

from __future__ import annotations

import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from posttrain.commands.checks.check import Check, Figures, Wrong, numbers, within
from posttrain.config.choices import OPTIMIZERS
from posttrain.models.kernels.beside import apart
from posttrain.training.checkpoint import newest_checkpoint, restore, save_checkpoint
from posttrain.training.optimizer import make_moments
from posttrain.training.optimizers._kind import Settings

SIDE = 256
NF4_ERROR = 0.12  # of Gaussian weights it is 0.09: half of the mean distance of its sixteen values
STEPS = 8
ROUNDING = {"adamw": 1e-4, "paged_adamw_32bit": 1e-3}  # bitsandbytes' kernel divides less exactly: 1.0e-4 on an H100


def nf4(device: torch.device) -> Figures:
    """The same codes and values as on the CPU, and a product of them."""
    from bitsandbytes import functional

    weight, x = numbers((SIDE, SIDE), (4, SIDE))
    found: list[Tensor] = []
    for place in (device, torch.device("cpu")):
        codes, state = functional.quantize_4bit(weight.to(place, torch.float32), quant_type="nf4", compress_statistics=True)
        found.append(functional.dequantize_4bit(codes, state))
    here, there = found
    errors = {"against the CPU": apart(here, there), "of a product": apart(x.to(device) @ here.T, x @ there.T)}
    if (lost := apart(here, weight)) > NF4_ERROR:
        raise Wrong(f"four bits lose {lost:.1%} of Gaussian weights, which is more than {NF4_ERROR:.0%}")
    return within(errors, 1e-2) | {"lost_of_weights": lost}


def int8(device: torch.device) -> Figures:
    """A layer of LLM.int8() against its weights in float32."""
    from bitsandbytes.nn.modules import Int8Params, Linear8bitLt

    weight, x = numbers((SIDE, SIDE), (32, SIDE))
    layer: Any = Linear8bitLt(SIDE, SIDE, bias=False, has_fp16_weights=False, threshold=6.0)
    layer.weight = Int8Params(weight.to(torch.float16), requires_grad=False, has_fp16_weights=False)  # pyright: ignore
    layer = layer.to(device)
    with torch.no_grad():
        out = layer(x.to(device, torch.float16))
    return within({"of a product": apart(out, x @ weight.T)}, 3e-2)


def optimizer(device: torch.device, name: str) -> Figures:
    """Steps on made-up gradients beside AdamW in float32 on the CPU; and the same bits after a checkpoint half-way."""
    straight, reference = _Trained(name, device), _Trained("adamw", torch.device("cpu"))
    for step in range(STEPS):
        straight.step(step)
        reference.step(step)
    halfway, again = _Trained(name, device), _Trained(name, device)
    for step in range(STEPS // 2):
        halfway.step(step)
    with tempfile.TemporaryDirectory() as folder:
        save_checkpoint(Path(folder), 1, halfway.module, halfway.optimizer, {}, {}, keep=1)
        checkpoint, _ = newest_checkpoint(Path(folder))
        assert checkpoint
        restore(checkpoint, again.module, again.optimizer)
    for step in range(STEPS // 2, STEPS):
        again.step(step)
    if not torch.equal(again.module.weight, straight.module.weight):
        raise Wrong("a checkpoint half-way changes bits")
    moved = [each.module.weight.detach().cpu() - each.began for each in (straight, reference)]
    return within({"of the way that the weights went": apart(*moved)}, ROUNDING.get(name, 5e-2))


class _Trained:
    """A layer with an optimizer, of the same numbers wherever it is."""

    def __init__(self, name: str, device: torch.device) -> None:
        self.began = numbers((SIDE, SIDE))[0]
        self.module = nn.Linear(SIDE, SIDE, bias=False, device=device)
        self.module.load_state_dict({"weight": self.began})
        self.optimizer = _optimizer(name, self.module)

    def step(self, number: int) -> None:
        self.module.weight.grad = numbers((SIDE, SIDE), seed=number + 10)[0].to(self.module.weight.device)
        self.optimizer.step()


def _optimizer(name: str, module: nn.Module) -> Optimizer:
    made = OPTIMIZERS.get(name).make([{"params": list(module.parameters())}], Settings(1e-2, (0.9, 0.99), 1e-8))
    make_moments(made)
    return made


NUMBER_CHECKS = (
    Check("NF4", nf4),
    Check("int8", int8),
    *(Check(f"optim={name}", partial(optimizer, name=name)) for name in ("adamw", "adamw_8bit")),
    *(Check(f"optim={name}", partial(optimizer, name=name)) for name in ("paged_adamw_8bit", "paged_adamw_32bit")),
)
