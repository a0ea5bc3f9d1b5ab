"""AdaLoRA (Zhang et al. 2023, arXiv 2303.10512): P Lambda Q in place of B A, whose singular values go where they matter least."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from posttrain.config.fields import Positive, Share
from posttrain.errors import UserError
from posttrain.models.peft.methods.lora import SavedAsLora

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor

    from posttrain.models.peft.factors import Factors

AVERAGES = ("ipt", "exp_avg_ipt", "exp_avg_unc")  # peft's sensitivity, its smoothed value and uncertainty, by parameter


class AdaLora(SavedAsLora):
    """LoRA whose ranks move to the layers that need them."""

    method: Literal["adalora"]
    init_r: Positive  # every layer's rank at the start; r is their mean at the end
    start: Share  # share of the steps before ranks begin to go
    end: Share  # share of the steps after they have gone
    orthogonality: Annotated[float, Field(ge=0)]  # weight of the penalty on P and Q

    @model_validator(mode="after")
    def _a_time_between(self) -> AdaLora:
        if self.start + self.end >= 1:
            raise ValueError(f"peft.start and peft.end are shares of the run and leave none between ({self.start} + {self.end})")
        if self.r >= self.init_r:
            raise ValueError(f"peft.r: {self.r} is not below peft.init_r={self.init_r}; ranks only go down")
        return self

    @property
    def least_width(self) -> int:
        return self.init_r

    def check_steps(self, num_steps: int) -> None:
        """peft weighs singular values in the steps before the one in which the last of them go: there must be such a step."""
        last = num_steps - int(self.end * num_steps)
        if last < 2:
            raise UserError(
                f"train.max_steps: of {num_steps} steps adalora drops its last ranks in step {last}, and has none before to "
                f"weigh them in; give more steps"
            )

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import AdaLoraConfig

        from posttrain.models.peft.export import whole_number
        from posttrain.models.peft.targets import layer_options

        common: dict[str, Any] = layer_options(self.targets_in(model), model) | {
            "task_type": task,
            "lora_alpha": whole_number(self.alpha),
        }
        return AdaLoraConfig(
            target_r=self.r, init_r=self.init_r, total_step=num_steps, tinit=int(self.start * num_steps),
            tfinal=int(self.end * num_steps), deltaT=1, orth_reg_weight=self.orthogonality, lora_dropout=self.dropout, **common,
        )  # fmt: skip

    def step_callback(self, model: PeftModel) -> RankAllocator:
        return RankAllocator(model)

    def record(self, model: PeftModel) -> dict[str, Any]:
        return super().record(model) | {"ranks": final_ranks(model)}

    def sums(self, model: PeftModel) -> tuple[float, dict[str, Factors]]:
        from posttrain.models.peft.export import lora_layers

        return 1.0, {name: _kept(layer) for name, layer in lora_layers(model).items()}


METHOD = AdaLora


class RankAllocator:
    """AdaLoRA's part in an optimizer step: the penalty, and who keeps which rank. Calls peft's allocator, and knows what of it a
    checkpoint must keep."""

    def __init__(self, model: PeftModel) -> None:
        from posttrain.models.peft.attach import NEW

        self.model = model
        self.adapter = NEW
        self.tuner: Any = model.base_model
        self.config: Any = model.peft_config[NEW]

    def penalty(self) -> Tensor:
        """Mean over all P and Q of ||P^T P - I||_F, times its weight (eq. 4): added to the mean loss."""
        import torch

        found = []
        for name, p in self.model.named_parameters():
            if f".lora_A.{self.adapter}" in name or f".lora_B.{self.adapter}" in name:
                gram = p @ p.T if ".lora_A." in name else p.T @ p
                found.append(torch.linalg.matrix_norm(gram - torch.eye(len(gram), device=p.device, dtype=p.dtype)))
        return self.config.orth_reg_weight * torch.stack(found).mean()

    def after_step(self, done: int) -> None:
        """Update importance and drop singular values after step number `done` (from 1), with its gradients still there."""
        self.tuner.update_and_allocate(done)

    def state(self) -> dict[str, Tensor]:
        """What the allocator remembers from step to step."""
        import torch

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


def final_ranks(model: Any) -> dict[str, int]:
    """How many singular values each layer has kept."""
    from posttrain.models.peft.attach import NEW
    from posttrain.models.peft.export import lora_layers

    layers = lora_layers(model)
    return {name: int((layer.lora_E[NEW] != 0).sum()) for name, layer in layers.items() if hasattr(layer, "lora_E")}


def _kept(layer: Any) -> Factors:
    """P Lambda Q without the singular values that were dropped."""
    from posttrain.models.peft.attach import NEW
    from posttrain.models.peft.factors import Factors
    from posttrain.tensors import whole

    values = whole(layer.lora_E[NEW]).float()
    kept = values[:, 0] != 0
    scale = layer.scaling[NEW] / float(layer.ranknum[NEW] + 1e-5)  # as peft's forward has it
    a, b = whole(layer.lora_A[NEW]).float(), whole(layer.lora_B[NEW]).float()
    return Factors((a * values)[kept], b[:, kept] * scale)
