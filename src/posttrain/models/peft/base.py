"""What methods have in common: weights of the model's own, adapters that peft puts on a model, and their kinds of settings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field

from posttrain.config.fields import Positive
from posttrain.config.interfaces import Method

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel


class OwnWeights(Method):
    """Trains weights of the model itself, and leaves a whole model."""

    output = "model"
    writes_base = True
    for_ppo = True
    for_fsdp = True


class Adapted(Method):
    """With weights of its own, in a dtype of their own, that peft puts on the model."""

    dtype: Literal["float32", "bfloat16"]

    def peft_config(self, model: Any, num_steps: int, task: str | None) -> PeftConfig:
        """peft's own description of it."""
        raise NotImplementedError

    def attach(self, model: Any, num_steps: int, task: str | None) -> Any:
        from peft import get_peft_model

        from posttrain.models.peft.attach import NEW

        if self.saves:
            self.saves.register()
        return self._ready(get_peft_model(model, self.peft_config(model, num_steps, task), adapter_name=NEW))

    def continue_from(self, model: Any, adapter_dir: Path) -> Any:
        from posttrain.models.peft.attach import NEW, load_adapter

        made = load_adapter(model, adapter_dir, is_trainable=True)
        self.check_continued(made.peft_config[NEW])
        return self._ready(made)

    def check_continued(self, found: Any) -> None:
        """Raises UserError where peft's description of the adapter to go on with is not that of these settings."""

    def export(self, model: PeftModel, out_dir: Path, base_path: str, is_writer: bool) -> None:
        """As peft writes it."""
        from posttrain.models.peft.export import write_as_peft

        if is_writer:
            write_as_peft(model, out_dir, base_path)

    def _ready(self, model: Any) -> Any:
        import torch

        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(getattr(torch, self.dtype))
        model.peft_method = self  # models/peft/export.py asks for it: who has put an adapter on also writes it
        return model


class Targeted(Adapted):
    """On linear layers: all-linear, a list of module names, or a regular expression over full names."""

    targets: str | list[str]
    r: Positive
    dropout: Annotated[float, Field(ge=0, lt=1)]

    def with_targets(self, named: dict[str, str]) -> Self:
        if isinstance(self.targets, str) and self.targets in named:
            return self.model_copy(update={"targets": named[self.targets]})
        return self

    def check_continued(self, found: Any) -> None:
        check_rank_continued(found.r, self.r)


class SoftPrompt(Adapted):
    """Virtual tokens: soft ones before the text, or a prefix of keys and values."""

    length: Positive

    def continue_from(self, model: Any, adapter_dir: Path) -> Any:
        """peft loads no prompt for training: a new one takes the finished one's values."""
        from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

        from posttrain.errors import UserError
        from posttrain.models.peft.attach import NEW, TASK

        length = PeftConfig.from_pretrained(str(adapter_dir)).num_virtual_tokens  # pyright: ignore
        if length != self.length:
            raise UserError(f"peft.length: init's has {length} virtual tokens, not {self.length}; say peft.length={length}")
        made = self.attach(model, 1, TASK)
        set_peft_model_state_dict(made, load_peft_weights(str(adapter_dir), device="cpu"), adapter_name=NEW)
        return made


def check_rank_continued(found: int, asked: int) -> None:
    """Raises UserError where an adapter that is to be trained on has another rank."""
    from posttrain.errors import UserError

    if found != asked:
        raise UserError(
            f"peft.r: the adapter that chain.mode=continue goes on with has rank {found}, not {asked}; say peft.r={found}"
        )


def has_no_weights(model: Any) -> bool:
    """Is it on the meta device, where only shapes can be had?"""
    return next(model.parameters()).is_meta
