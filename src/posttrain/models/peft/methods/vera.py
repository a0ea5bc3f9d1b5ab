"""VeRA (Kopiczko et al. 2023, arXiv 2310.11454): two vectors a layer on random matrices that all layers share, frozen."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any, Literal

from posttrain.config.fields import NonNegative, Rate
from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import Targeted, check_same
from posttrain.models.peft.kinds import odd_setting, odd_tensor

if TYPE_CHECKING:
    from torch import Tensor

UNDERSTOOD = {"r", "d_initial", "projection_prng_key", "save_projection", "vera_dropout", "init_weights", "fan_in_fan_out"}
A, B = "base_model.vera_A", "base_model.vera_B"


class VeraKind(AdapterKind):
    """Files of two vectors for each layer, with the seed of the shared matrices."""

    merges = True
    is_added = True

    def objection(self, config: dict[str, Any], tensors: Collection[str] = ()) -> str:
        if tensors and not {A, B} <= set(tensors):
            return "its random matrices are not in its files (save_projection=false)"
        return odd_setting(config, UNDERSTOOD) or odd_tensor(tensors, (".vera_lambda_b", ".vera_lambda_d", A, B))

    def layers(self, tensors: Collection[str]) -> list[str]:
        return sorted(name.removesuffix(".vera_lambda_b") for name in tensors if name.endswith(".vera_lambda_b"))

    def is_zero(self, adapter: Any) -> bool:
        return not any(bool(adapter.tensors[f"{layer}.vera_lambda_b"].any()) for layer in adapter.modules)

    def changed(self, adapter: Any, layer: str, weight: Tensor) -> Tensor:
        b, d = (adapter.tensors[f"{layer}.vera_lambda_{which}"].float() for which in "bd")
        rows, columns = weight.shape
        a = d[:, None] * adapter.tensors[A].float()[: len(d), :columns]
        return weight + b[:, None] * (adapter.tensors[B].float()[:rows, : len(d)] @ a)


class Vera(Targeted):
    """Two vectors for each layer, between frozen random matrices."""

    saves = VeraKind("vera", "VERA")
    own_parts = ("vera_",)
    can_continue = True
    on_quantized = True
    for_images = True
    for_ppo = True
    method: Literal["vera"]
    d_initial: Rate
    seed: NonNegative  # of the frozen random matrices

    @property
    def least_width(self) -> int:
        return 1

    def check_continued(self, found: Any) -> None:
        super().check_continued(found)
        check_same("seed", found.projection_prng_key, self.seed)

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import VeraConfig

        from posttrain.models.peft.targets import layer_options

        common: dict[str, Any] = layer_options(self.targets_in(model), model) | {"task_type": task}
        return VeraConfig(r=self.r, vera_dropout=self.dropout, d_initial=self.d_initial, projection_prng_key=self.seed, **common)


METHOD = Vera
