"""The one seam between a model and the kernels: which of its modules are taken over, which are not, and why (`model.kernels`)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from posttrain.config.choices import Kernels
from posttrain.models.kernels.candidates import KERNELS, adds_more
from posttrain.models.kernels.fused import replace_forward
from posttrain.models.kernels.inference_weights import inference_weights, missing
from posttrain.models.kernels.liger import LIGER, liger
from posttrain.models.kernels.pointwise import obstacle


@dataclass(frozen=True)
class LeftOut:
    """Modules of one class that a kernel might be for, and that keep their own forward.

    expected: the kernel was written for them, so people should hear of it.
    """

    kernel: str
    module: str
    why: str
    expected: bool


@dataclass(frozen=True)
class KernelReport:
    """What became of a model's modules. kernels: as `model.kernels`. taken, left: numbers of modules."""

    kernels: Kernels
    taken: dict[str, int]
    left: dict[LeftOut, int]

    @property
    def warning(self) -> str:
        """One line on what was expected and is missing; '' where nothing is."""
        lost = [f"{each.kernel} of {count} {each.module} ({each.why})" for each, count in self.left.items() if each.expected]
        return f"kernels not used, which costs time and memory: {'; '.join(lost)}" if lost else ""

    @property
    def lines(self) -> list[str]:
        """What people should hear of it: what liger-kernel computes, and the warning."""
        lent = [f"{name} in {count} modules" for name, count in sorted(self.taken.items()) if name.endswith(LIGER)]
        said = f"computed by an extra that is installed: {', '.join(lent)}" if lent else ""
        return [line for line in (said, self.warning) if line]

    def with_taken(self, kernel: str) -> KernelReport:
        """With one that was found to serve the model as a whole, after the report was made."""
        return replace(self, taken={**self.taken, kernel: 1})

    def with_left(self, kernel: str, module: str, why: str) -> KernelReport:
        """With one that was found not to."""
        taken = {name: count for name, count in self.taken.items() if name != kernel}
        return replace(self, taken=taken, left={**self.left, LeftOut(kernel, module, why, True): 1})

    def record(self) -> dict[str, Any]:
        """For a manifest."""
        left = [{"kernel": e.kernel, "module": e.module, "modules": count, "why": e.why} for e, count in self.left.items()]
        return {"choice": self.kernels, "taken_over": dict(self.taken), "left": left}


def use_kernels(model: nn.Module, kernels: Kernels) -> KernelReport:
    """Give every module of `model` that has a leaner way its leaner way; weights and their names stay as they are. To be called
    again where adapters have been added.

    Args:
        kernels: auto, or reference: the modules of transformers and peft as they are. How attention is computed is no matter of
            this but of `model.attention`, whose plain way is `dense`.
    """
    taken, left, judged = Counter[str](), Counter[LeftOut](), dict[Any, str]()
    device = device_of(model)
    for module in model.modules() if kernels == "auto" else ():
        for kernel in KERNELS:
            if not kernel.is_candidate(module) or (kernel.triton == "all" and device.type != "cuda"):
                continue
            kind = (kernel.name, *(type(getattr(module, name, module)) for name in ("act_fn", "base_layer")), adds_more(module))
            if kind not in judged:
                judged[kind] = kernel.differs(module) or (obstacle(device) if kernel.triton == "all" else "")
            if why := judged[kind]:
                left[LeftOut(kernel.name, type(module).__name__, why, kernel.is_expected(module))] += 1
            else:
                other = liger(kernel.name, device)
                if other.why:
                    left[LeftOut(f"{kernel.name} by {LIGER}", type(module).__name__, other.why, True)] += 1
                if kernel.triton == "faster" and device.type == "cuda" and (slower := obstacle(device)):
                    left[LeftOut(f"{kernel.name} by Triton", type(module).__name__, slower, True)] += 1
                replace_forward(module, other.forward or kernel.forward(type(module)))
                taken[f"{kernel.name} by {LIGER}" if other.forward else kernel.name] += 1
    if kernels == "auto":
        left.update(_not_laid_out(model))
    return KernelReport(kernels, dict(taken), dict(left))


def device_of(model: nn.Module) -> torch.device:
    """Where it computes."""
    return next((p.device for p in model.parameters()), torch.device("cpu"))


def for_inference(model: nn.Module, kernels: Kernels) -> AbstractContextManager[None]:
    """Inside, weights and active adapters must not change, and no gradient is to be had."""
    return inference_weights(model) if kernels == "auto" else nullcontext()


def _not_laid_out(model: nn.Module) -> Iterator[LeftOut]:
    """The linear layers that answers are written with on a CPU, where torch has not what lays their weights out."""
    name = missing()
    for module in model.modules() if name else ():
        if type(module) is nn.Linear and module.weight.device.type == "cpu":
            yield LeftOut("weights for writing answers", "Linear", f"torch {version('torch')} has no {name}", True)
