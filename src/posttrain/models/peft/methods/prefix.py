"""Prefix tuning (Li & Liang 2021, arXiv 2101.00190; P-tuning v2, arXiv 2110.07602): keys and values before every layer's own."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import SoftPrompt


class Prefix(SoftPrompt):
    """Keys and values before each layer's own."""

    saves = AdapterKind("prefix_tuning", "PREFIX_TUNING", "a prefix is no weight", virtual="prefix")
    own_parts = ("prompt_encoder",)
    can_continue = True
    on_quantized = True
    method: Literal["prefix"]

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import PrefixTuningConfig

        from posttrain.models.peft.attach import TASK

        # zero: random keys and values of the size that peft draws would drown the model's own
        return PrefixTuningConfig(num_virtual_tokens=self.length, init_weights="zero", task_type=TASK)


METHOD = Prefix
