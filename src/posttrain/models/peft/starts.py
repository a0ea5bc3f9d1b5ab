"""How a LoRA begins, `peft.init`: a row for each way. Imports no torch, for a config is checked by it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """option: what peft calls it. writes_base: the adapter's first values are taken out of the base, so that both together are
    the base; what the adapter becomes beyond them is the change."""

    option: bool | str = True
    writes_base: bool = False


STARTS = {
    "default": Start(),
    # the principal components (Meng et al. 2024, arXiv 2404.02948), by a randomised SVD: exact ones take minutes
    "pissa": Start("pissa_niter_16", writes_base=True),
    # orthonormal columns, of a QR decomposition (Buyukakyuz 2024, arXiv 2406.01775)
    "olora": Start("olora", writes_base=True),
}
