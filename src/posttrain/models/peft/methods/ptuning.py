"""P-tuning (Liu et al. 2021, arXiv 2103.10385): soft tokens from a small network, which is easier to train than they are."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config.fields import Positive
from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import SoftPrompt


class PTuning(SoftPrompt):
    """Soft tokens that a small network makes."""

    saves = AdapterKind("p_tuning", "P_TUNING", "a soft prompt is no weight", virtual="prompt")
    own_parts = ("prompt_encoder",)
    on_quantized = True
    method: Literal["ptuning"]
    hidden: Positive  # width of the prompt encoder

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import PromptEncoderConfig

        from posttrain.models.peft.attach import TASK

        return PromptEncoderConfig(num_virtual_tokens=self.length, encoder_hidden_size=self.hidden, task_type=TASK)


METHOD = PTuning
