"""AdaLoRA's part in an optimizer step (Zhang et al. 2023, arXiv 2303.10512): the penalty, and who keeps which rank."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from posttrain.models.peft.attach import NEW

if TYPE_CHECKING:
    from peft import PeftModel

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # peft's sensitivity, its smoothed value and uncertainty, by parameter


class RankAllocator:
    """Calls peft's allocator once an optimizer step, and knows what of it a checkpoint must keep."""

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[NEW]

    def penalty(self) -> Tensor:
        """Mean over all P and Q of ||P^T P - I||_F, times its weight (eq. 4): added to the mean loss."""
        found = []
        for name, p in self.model.named_parameters():
            if f".lora_A.{NEW}" in name or f".lora_B.{NEW}" in name:
                gram = p @ p.T if ".lora_A." in name else p.T @ p
                found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
        return self.config.orth_reg_weight * torch.stack(found).mean()

    def after_step(self, done: int) -> None:
        """Update importance and drop singular values after step number `done` (from 1), with its gradients still there."""
        self.tuner.update_and_allocate(done)

    def state(self) -> dict[str, Tensor]:
        """What the allocator remembers from step to step."""
        allocator = self.tuner.rankallocator
        found = {f"{kind}|{name}": value for kind in AVERAGES for name, value in getattr(allocator, kind).items()}
        pattern = self.config.rank_pattern or {}
        return found | {f"pattern|{name}": torch.tensor(kept, dtype=torch.uint8) for name, kept in pattern.items()}

    def load(self, state: dict[str, Tensor]) -> None:
        """Put back what `state` gave."""
        allocator = self.tuner.rankallocator
        devices = {name: p.device for name, p in self.tuner.model.named_parameters()}
        pattern: dict[str, list[bool]] = {}
        for key, value in state.items():
            kind, _, name = key.partition("|")
            if kind == "pattern":
                pattern[name] = value.bool().tolist()
            else:
                getattr(allocator, kind)[name] = value.to(devices[name])
        self.config.rank_pattern = pattern or None
