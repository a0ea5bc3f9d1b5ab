"""Every kernel that a run may use on this device, against the same formula on the CPU in float32: values and gradients."""

from __future__ import annotations

from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from posttrain.commands.checks.check import APART, Check, Figures, NotHere, Wrong, numbers, within
from posttrain.models.kernels import usable
from posttrain.models.kernels.attention import attention_function
from posttrain.models.kernels.beside import compared
from posttrain.models.kernels.fused import RMSNorm, SiluProduct, with_lora
from posttrain.models.kernels.liger import FORWARDS, liger
from posttrain.models.kernels.logprobs import Head, plain_logprobs, token_logprobs
from posttrain.models.kernels.masks import Asked, DocumentMask
from posttrain.models.kernels.pointwise import Rotated, rotate
from posttrain.models.kernels.pointwise import obstacle as obstacle_of_triton
from posttrain.models.kernels.usable import TRIED, card_of, obstacle

CPU = torch.device("cpu")
HEADS = (8, 2)  # of queries, of keys
SIZES = (64, 128, 256)  # of a head: Llama 3.2 1B, Llama 3 8B, Gemma 3
WIDTH = 256
ROWS = 96


def dtypes(device: torch.device) -> list[torch.dtype]:
    """That a run may compute in: bfloat16 where the card has it."""
    capability = card_of(device).capability
    return [torch.float32, torch.bfloat16 if capability is None or capability >= (8, 0) else torch.float16]


def attention(device: torch.device, how: str) -> Figures:
    """A pack with a document and a prompt that two answers share, with a window and without, for heads of several sizes."""
    errors: dict[str, float] = {}
    reasons: list[str] = []
    for dtype in dtypes(device):
        for size in SIZES if how != "flex" else SIZES[1:2]:  # each is compiled for, in half a minute
            for window in (None, 40):
                asked = Asked(*HEADS, size, size, window, None, False)
                if how in ("varlen", "flex") and (why := obstacle(how, [asked], dtype, device, attention_function)):
                    reasons.append(why)
                    continue
                name = f"{str(dtype)[6:]} heads of {size}{' window' if window else ''}"
                errors[name] = _attention_apart(how, size, window, device, dtype) / usable.APART[dtype]
    if not errors:
        raise NotHere(reasons[0])
    for reason in filter(_is_wrong, reasons):
        raise Wrong(reason)
    return within(errors, 1.0) | {"unit": "of what rounding may cause", "not for": sorted(set(reasons))}


def _is_wrong(reason: str) -> bool:
    """Did a try of a kernel fail? Else this machine lacks what it needs."""
    return "computes something else" in reason or "does not run here" in reason


def _attention_apart(how: str, size: int, window: int | None, device: torch.device, dtype: torch.dtype) -> float:
    length = TRIED[-1].stop

    def compute(*inputs: Tensor, way: str, place: torch.device) -> Tensor:
        mask = DocumentMask(TRIED, length, place)
        return attention_function(way)(nn.Identity(), *inputs, None, document_mask=mask, sliding_window=window)[0]

    inputs = numbers(*((1, heads, length, size) for heads in (HEADS[0], HEADS[1], HEADS[1])))
    reference = partial(compute, way="dense", place=CPU)
    return compared(partial(compute, way=how, place=device), reference, [x.to(device, dtype) for x in inputs], CPU)


def rms_norm(device: torch.device) -> Figures:
    """x / rms(x) * w."""

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * weight

    return _in_all(device, lambda x, weight: RMSNorm.apply(x, weight, 1e-6), reference, (ROWS, WIDTH), (WIDTH,))


def swiglu(device: torch.device) -> Figures:
    """silu(gate) * up."""
    return _in_all(device, SiluProduct.apply, lambda gate, up: silu(gate) * up, (ROWS, WIDTH), (ROWS, WIDTH))


def rope(device: torch.device) -> Figures:
    """x turned by its place, and its gradient turned back."""
    angles = numbers((1, ROWS, 64), seed=5)[0]

    def ours(x: Tensor, of_angles: torch.dtype | None) -> Tensor:
        turn = [part.to(device, of_angles or x.dtype) for part in (angles.cos(), angles.sin())]
        return Rotated.apply(x, *turn, of_angles or x.dtype)  # pyright: ignore[reportReturnType]

    if why := obstacle_of_triton(device):
        raise (Wrong if _is_wrong(why) else NotHere)(why)
    shape, reference = (2, HEADS[0], ROWS, 64), lambda x: rotate(x, angles.cos(), angles.sin())
    _in_all(device, partial(ours, of_angles=torch.float32), reference, shape)  # as under autocast
    return _in_all(device, partial(ours, of_angles=None), reference, shape)


def lora(device: torch.device) -> Figures:
    """W x + s B A x, the gradients of A and B among them."""
    rank, scale = 8, 2.0

    def fused(x: Tensor, a: Tensor, b: Tensor, *, weight: Tensor) -> Tensor:
        holder = nn.Sequential()
        holder.add_module("linear", nn.Linear(WIDTH, WIDTH, bias=False))
        settings: Any = LoraConfig(r=rank, lora_alpha=int(rank * scale), target_modules=["linear"])
        layer: Any = get_peft_model(holder, settings).base_model.model.linear.to(device)  # pyright: ignore
        layer.base_layer.weight = nn.Parameter(weight.to(x.device, x.dtype), requires_grad=False)
        layer.lora_A["default"], layer.lora_B["default"] = _Factor(a), _Factor(b)
        return with_lora(layer, x, None)

    weight = numbers((WIDTH, WIDTH), seed=7)[0] / WIDTH**0.5

    def reference(x: Tensor, a: Tensor, b: Tensor) -> Tensor:
        return linear(x, weight.to(_now(device)).float()) + scale * linear(linear(x, a), b)

    return _in_all(
        device, partial(fused, weight=weight.to(_now(device)).float()), reference, (ROWS, WIDTH), (rank, WIDTH), (WIDTH, rank)
    )


def _now(device: torch.device) -> torch.dtype:
    return dtypes(device)[-1]  # a weight that both formats have


class _Factor(nn.Module):
    """A factor whose weight is somebody's tensor."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight: Any = weight


def loss(device: torch.device) -> Figures:
    """Log-probs of tokens without whole logits."""
    words = 1000
    target = torch.arange(ROWS) % words
    weight = numbers((words, WIDTH), seed=3)[0] / WIDTH**0.5

    def ours(hidden: Tensor) -> Tensor:
        return token_logprobs(hidden, target.to(device), Head(weight.to(device, hidden.dtype), None, 1.0, None), 32, 300)

    def reference(hidden: Tensor) -> Tensor:
        return plain_logprobs(hidden, target, Head(weight, None, 1.0, None))

    return _in_all(device, ours, reference, (ROWS, WIDTH))


def by_liger(device: torch.device) -> Figures:
    """As a run tries liger-kernel before it uses it."""
    if find_spec("liger_kernel") is None:
        raise NotHere("liger-kernel is not installed: pip install 'posttrain[liger]'")
    if wrong := {name: why for name in FORWARDS if (why := liger(name, device).why)}:
        raise Wrong("; ".join(f"{name}: {why}" for name, why in wrong.items()))
    return {"used for": list(FORWARDS)}


def _in_all(device: torch.device, compute: Any, reference: Any, *shapes: tuple[int, ...]) -> Figures:
    """In every format that a run may compute in; errors are divided by what rounding may cause."""
    errors: dict[str, float] = {}
    for dtype in dtypes(device):
        inputs = [x.to(device, dtype) for x in numbers(*shapes)]
        errors[str(dtype)[6:]] = compared(compute, reference, inputs, CPU) / APART[dtype]
    return within(errors, 1.0) | {"unit": "of what rounding may cause"}


KERNEL_CHECKS = (
    Check("attention: documents", partial(attention, how="documents")),
    Check("attention: dense", partial(attention, how="dense")),
    Check("attention: varlen", partial(attention, how="varlen"), cards=1),
    Check("attention: flex", partial(attention, how="flex"), cards=1),
    Check("RMSNorm", rms_norm),
    Check("SwiGLU", swiglu),
    Check("RoPE", rope, cards=1),
    Check("linear layer with LoRA", lora),
    Check("loss without whole logits", loss),
    Check("liger-kernel", by_liger, cards=1),
)
