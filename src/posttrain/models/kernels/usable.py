"""Whether a way of attention can be had here: what is known of its kernel, and then a try against all scores written out.

The try is of random numbers in the shapes that the model's layers have asked for, values and gradients, so a kernel that does not
compile, does not fit the card or computes something else is passed over before the first step.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.batch import Segment
from posttrain.errors import first_line
from posttrain.models.kernels.beside import compared
from posttrain.models.kernels.masks import Asked, DocumentMask

Ways = Callable[[str], Callable[..., tuple[Tensor, Any]]]  # a way's function, as transformers' AttentionInterface has it
HALF = (torch.bfloat16, torch.float16)
APART = {torch.bfloat16: 2e-2, torch.float16: 5e-3, torch.float32: 5e-3}  # relative error that rounding, TF32 included, may cause
NEAR = 40  # the window that stands for any in a try
# a document, and a prompt with two answers; the last lies beyond a block of FlexAttention from its prompt
TRIED = (Segment(0, 150), Segment(150, 250), Segment(250, 320, 150, 250), Segment(320, 400, 150, 250))


class Card(NamedTuple):
    """capability: of CUDA; None without it. compiles: is there what Triton needs?"""

    capability: tuple[int, int] | None
    compiles: bool


def card_of(device: torch.device) -> Card:
    """The card that this device is."""
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    return Card(capability, bool(compiler) and find_spec("triton") is not None)


def obstacle(how: str, asked: Sequence[Asked], dtype: torch.dtype, device: torch.device, ways: Ways) -> str:
    """'' where this way computes what the layers ask for, else why not. how: varlen | flex."""
    known = (_known(how, each, dtype, card_of(device)) for each in dict.fromkeys(asked))
    return next(filter(None, known), "") or _tried(how, tuple(dict.fromkeys(asked)), dtype, device, ways)


def _known(how: str, asked: Asked, dtype: torch.dtype, card: Card) -> str:
    """What needs no try."""
    if how == "varlen" and (asked.sinks or asked.softcap is not None):
        return "varlen cannot compute its softcap or sinks"
    if card.capability is None:
        return f"{how} needs a CUDA device"
    if how == "flex":
        return "" if card.compiles else "flex needs Triton and a C compiler (gcc, or CC=...), which are not here"
    if dtype not in HALF:
        return f"varlen computes in 16 bits, and the model in {str(dtype).removeprefix('torch.')}"
    if card.capability < (8, 0):
        return f"varlen needs a card of compute capability 8.0, and this one has {'.'.join(map(str, card.capability))}"
    if asked.size != asked.value_size:
        return f"varlen needs keys and values of one size, and a head's are {asked.size} and {asked.value_size}"
    if asked.size % 8 or asked.size > 256:
        return f"varlen has no kernel for heads of size {asked.size}"
    return ""


def beside(
    compute: Callable[..., Tensor], reference: Callable[..., Tensor], shapes: Sequence[Sequence[int]], device: torch.device
) -> str:
    """'' where both give the same values and gradients of random bfloat16, up to rounding, else what is wrong with `compute`."""
    random, dtype = torch.Generator().manual_seed(0), torch.bfloat16
    numbers = [torch.randn(*shape, generator=random, device="cpu").to(device, dtype) for shape in shapes]
    return _in_words(compared(compute, reference, numbers), dtype)


def _in_words(error: float, dtype: torch.dtype) -> str:
    """'' where it is rounding."""
    return "" if error <= APART[dtype] else f"computes something else here (relative error {error:.1e})"


@cache
def _tried(how: str, asked: Iterable[Asked], dtype: torch.dtype, device: torch.device, ways: Ways) -> str:
    for each in asked:
        try:
            wrong = _in_words(_apart(how, each, dtype, device, ways), dtype)
        except Exception as error:  # of a compiler, a driver or a kernel: whatever it is, another way is taken
            return f"{how} does not run here ({first_line(error)})"
        if wrong:
            return f"{how} {wrong}"
    return ""


def _apart(how: str, asked: Asked, dtype: torch.dtype, device: torch.device, ways: Ways) -> float:
    """The largest relative error of the output and of the gradients."""
    random, length = torch.Generator().manual_seed(0), TRIED[-1].stop
    shapes = [(asked.heads, asked.size), (asked.key_heads, asked.size), (asked.key_heads, asked.value_size)]
    numbers = [torch.randn(1, n, length, d, generator=random, device="cpu").to(device, dtype) for n, d in shapes]
    window = asked.window and min(asked.window, NEAR)
    sinks = torch.zeros(asked.heads, device=device, dtype=dtype) if asked.sinks else None
    options: dict[str, Any] = {"sliding_window": window, "softcap": asked.softcap, "s_aux": sinks}

    def compute(*inputs: Tensor, way: str) -> Tensor:
        mask = DocumentMask(TRIED, length, device)
        return ways(way)(nn.Identity(), *inputs, None, document_mask=mask, **options)[0]

    with torch.autocast(device.type, enabled=False):
        return compared(partial(compute, way=how), partial(compute, way="dense"), numbers)
