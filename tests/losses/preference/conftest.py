"""TRL's own preference losses, called by themselves: a model that says what it is told to, and a trainer without training."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

TrlLoss = Callable[..., float]


class Alone:
    """An accelerator of one process."""

    device = torch.device("cpu")

    def gather(self, values: Tensor) -> Tensor:
        return values

    gather_for_metrics = gather


@pytest.fixture(scope="session")
def trl_loss() -> TrlLoss:
    """(loss, policy, reference, lengths, beta) -> the mean over pairs of TRL's loss called so. Tables as ours: [2P]."""
    pytest.importorskip("trl")
    from trl.trainer.dpo_trainer import DPOTrainer

    def loss(name: str, policy: Tensor, reference: Tensor, lengths: Tensor, beta: float, **options: Any) -> float:
        order = [*range(0, len(policy), 2), *range(1, len(policy), 2)]  # theirs: all chosen, then all rejected
        policy, reference, counts = policy[order], reference[order], lengths[order].long()
        width = int(counts.max()) + 1  # one token of a prompt before each answer
        mask = (torch.arange(width) > 0) & (torch.arange(width) <= counts[:, None])
        per_token = torch.where(mask[:, 1:], policy[:, None] / counts[:, None], 0.0)
        said = SimpleNamespace(
            log_probs=per_token, entropy=torch.zeros_like(per_token), mean_logits=per_token, is_top1=mask[:, 1:], aux_loss=None
        )
        trainer = SimpleNamespace(
            model=torch.nn.Identity(), accelerator=Alone(), aux_loss_enabled=False, ld_alpha=None, precompute_ref_logps=True,
            f_divergence_type="reverse_kl", loss_types=[name], loss_weights=[1.0], beta=beta, use_weighting=False,
            label_smoothing=0.0, args=SimpleNamespace(), _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
        )  # fmt: skip
        vars(trainer).update(options)
        half = len(order) // 2
        inputs = {
            "input_ids": torch.zeros(len(order), width, dtype=torch.int64), "attention_mask": torch.ones(len(order), width),
            "completion_mask": mask.long(), "ref_chosen_logps": reference[:half], "ref_rejected_logps": reference[half:],
        }  # fmt: skip
        call: Any = DPOTrainer._compute_loss
        return float(call(trainer, lambda **_: said, inputs, False))

    return loss


@pytest.fixture(scope="session")
def ragged() -> tuple[Tensor, Tensor, Tensor]:
    """policy, reference and lengths of six pairs that have nothing in common."""
    torch.manual_seed(0)
    lengths = torch.tensor([3.0, 7, 1, 2, 12, 5, 4, 4, 9, 1, 6, 8])
    return -lengths * torch.rand(12), -lengths * torch.rand(12), lengths


@pytest.fixture(scope="session")
def trl_kto() -> TrlLoss:
    """(loss, policy, reference, good, mismatched, beta) -> the mean over answers of TRL's KTO loss called so. mismatched:
    `Answers` of other prompts, for the KL."""
    pytest.importorskip("trl")
    from trl.trainer.kto_trainer import KTOTrainer

    def loss(name: str, policy: Tensor, reference: Tensor, good: Tensor, mismatched: Any, beta: float, **options: float) -> float:
        said = SimpleNamespace(log_probs=policy[:, None], entropy=torch.zeros(len(policy), 1), aux_loss=None)
        said.mean_logits, said.is_top1 = said.entropy, said.entropy > 0
        trainer = SimpleNamespace(
            model=torch.nn.Identity(), accelerator=Alone(), aux_loss_enabled=False, precompute_ref_logps=True, loss_type=name,
            calculate_KL=mismatched is not None, beta=beta, desirable_weight=1.0, undesirable_weight=1.0, args=SimpleNamespace(),
            _metrics={"train": defaultdict(list)}, _total_train_tokens=0, _tp_size=1,
            _compute_kl_logps=lambda model, batch: mismatched.policy if mismatched else None,
        )  # fmt: skip
        vars(trainer).update(options)
        width = torch.ones(len(policy), 2)
        inputs = {
            "input_ids": width.long(), "attention_mask": width, "completion_mask": width.long(), "label": good,
            "ref_logps": reference, "ref_KL_logps": mismatched.reference if mismatched else None,
        }  # fmt: skip
        call: Any = KTOTrainer._compute_loss
        return float(call(trainer, lambda **_: said, inputs, False))

    return loss
