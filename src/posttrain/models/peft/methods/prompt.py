"""Prompt tuning (Lester et al. 2021, arXiv 2104.08691): soft tokens before the text."""

from __future__ import annotations

from typing import Any, Literal

from posttrain.config.interfaces import AdapterKind
from posttrain.models.peft.base import SoftPrompt


class Prompt(SoftPrompt):
    """Soft tokens before the text."""

    saves = AdapterKind("prompt_tuning", "PROMPT_TUNING", "a soft prompt is no weight", virtual="prompt")
    own_parts = ("prompt_encoder",)
    can_continue = True
    on_quantized = True
    method: Literal["prompt"]
    init: Literal["vocabulary", "random"]

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import PromptTuningConfig

        from posttrain.models.peft.attach import TASK

        return PromptTuningConfig(num_virtual_tokens=self.length, task_type=TASK)

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        made = super().attach(model, num_steps, task)
        if self.init == "vocabulary":
            _start_from_words(made)
        return made


METHOD = Prompt


def _start_from_words(model: Any) -> None:
    """Soft tokens begin as embeddings of words drawn from the vocabulary (section 3.2)."""
    import torch

    from posttrain.models.peft.attach import NEW

    words = model.get_base_model().get_input_embeddings()
    soft = model.prompt_encoder[NEW].embedding
    drawn = torch.randint(words.num_embeddings, (soft.num_embeddings,), device=words.weight.device)
    with torch.no_grad():
        soft.weight.copy_(words(drawn))
