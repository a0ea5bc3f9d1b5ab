"""How a LoRA begins, `peft.init`: a row for each way. Imports no torch, for a config is checked by it."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Start:
    """option: what peft calls it. writes_base: the adapter's first values are taken out of the base, so that both together are
    the base; what the adapter becomes beyond them is the change. zero: B is zero at the start. reads: of `READS` in
    config/interfaces.py. values: "module:function", model, peft's config and what is read -> the first values (first_values.py);
    '': peft makes them as it puts the adapter on. directions: how many of a layer's weight it looks at, in ranks. note: what
    a plan cannot know."""

    option: bool | str = True
    writes_base: bool = False
    zero: bool = False
    reads: str = ""
    values: str = ""
    directions: int = 1
    note: str = ""

    def values_of(self) -> Callable[..., dict[str, Any]]:
        """The function of `values`. Imports torch."""
        module, _, name = self.values.partition(":")
        return getattr(importlib.import_module(module), name)


_FILE = "posttrain.models.peft.first_values"
_EVA = "ranks go where the rows ask for them, and parameters with them: those here are of equal ranks"
_HELD = "before the first step a matrix of every layer that gets an adapter is held in float32, which is not counted here"
STARTS = {
    "default": Start(zero=True),
    # the principal components (Meng et al. 2024, arXiv 2404.02948), by a randomised SVD: exact ones take minutes
    "pissa": Start("pissa_niter_16", writes_base=True),
    # orthonormal columns, of a QR decomposition (Buyukakyuz 2024, arXiv 2406.01775)
    "olora": Start("olora", writes_base=True),
    # A is the principal components of a layer's inputs, and ranks go where those explain most (Paischer et al. 2024, 2410.07170)
    "eva": Start(zero=True, reads="rows", values=f"{_FILE}:eva", directions=2, note=_EVA),
    # the principal components of the weight times its inputs' covariance (Yang et al. 2024, arXiv 2406.05223)
    "corda": Start(writes_base=True, reads="rows", values=f"{_FILE}:corda", note=_HELD),
    # singular vectors of the loss's gradient (Wang et al. 2024, arXiv 2407.05000)
    "lora_ga": Start(writes_base=True, reads="loss", values=f"{_FILE}:lora_ga", directions=2, note=_HELD),
    # the principal components of what quantizing has taken from the weight (Li et al. 2023, arXiv 2310.08659), in one round
    "loftq": Start(reads="quantized", values=f"{_FILE}:loftq"),
}
