"""What methods have in common: weights of the model's own, adapters that peft puts on a model, and their kinds of settings."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

from posttrain.config.fields import Dropout, Positive
from posttrain.config.interfaces import Method

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel

    from posttrain.models.peft.targets import Targets


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
        from posttrain.models.peft.names import todays_names
        from posttrain.models.peft.quantized import read_packed
        from posttrain.models.peft.tokens import check_tied, settings

        if self.saves:
            self.saves.register()
        config: Any = self.peft_config(model, num_steps, task)
        if rows := settings(model):
            config.trainable_token_indices = rows
        with todays_names():
            made = get_peft_model(model, config, adapter_name=NEW)
        read_packed(made)
        check_tied(made)
        return self._ready(made)

    def continue_from(self, model: Any, adapter_dir: Path) -> Any:
        from posttrain.models.peft.attach import NEW, load_adapter
        from posttrain.models.peft.shared import check_shared

        asked = self.places(model)
        made = load_adapter(model, adapter_dir, is_trainable=True)
        check_shared(made, NEW)
        self.check_continued(made.peft_config[NEW])
        check_places_continued(self.placed_by, asked, adapted_names(made))
        return self._ready(made)

    placed_by: ClassVar[str] = "targets"

    def places(self, model: Any) -> set[str]:
        """Names of the layers, and of the parameters that are none, of a model that it would go on."""
        return set()

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


class Placed(Adapted):
    """On linear layers and fused experts: all-linear, a list of names, or a regular expression over full names.

    on_parameters: it can be put on what is no linear layer: fused experts, bare routers. on_transposed: on layers that keep their
    weight as [in, out], as GPT-2's do.
    """

    on_parameters: ClassVar[bool] = False
    on_transposed: ClassVar[bool] = True
    targets: str | list[str]
    experts: bool
    router: bool

    @property
    def ranks_wide(self) -> int:
        """How many ranks both sides of a layer must reach, where there is a rank."""
        return 1

    @property
    def least_width(self) -> int:
        """What both sides of a layer must reach."""
        return 1

    def misfit(self, size_in: int, size_out: int) -> str:
        """Why a layer of these sides, which are wide enough, cannot have it; '' where it can."""
        return ""

    def targets_in(self, model: Any) -> Targets:
        """What of a model it goes on; what it leaves out is said. Raises UserError where that is all."""
        from posttrain.console import say

        found = self.found_in(model)
        if not has_no_weights(model):
            for line in found.left:
                say(f"peft: {line}")
        return found

    def found_in(self, model: Any) -> Targets:
        """As `targets_in`, in silence."""
        from posttrain.models.peft.targets import Limits, targets_of

        limits = Limits(self.named, self.least_width, self.experts, self.router, self.on_parameters, self.not_found_again(model))
        more: dict[str, Any] = {"writes_base": self.writes_base, "transposed": self.on_transposed, "ranks_wide": self.ranks_wide}
        limits = limits._replace(**more, misfit=self.misfit)
        return targets_of(model, self.targets, limits)

    def record(self, model: Any) -> dict[str, Any]:
        left = self.found_in(model.get_base_model()).left
        return {"left_out": left} if left else {}

    def not_found_again(self, model: Any) -> Callable[[Iterable[str]], set[str]]:
        """Which of some linear layers plain peft would not find by name in what this method saves."""
        return lambda names: set()

    def with_targets(self, named: dict[str, str]) -> Self:
        if isinstance(self.targets, str) and self.targets in named:
            return self.model_copy(update={"targets": named[self.targets]})
        return self

    def places(self, model: Any) -> set[str]:
        found = self.targets_in(model)
        return {*found.layers, *(name.removesuffix(".weight") for name in found.parameters)}

    def _ready(self, model: Any) -> Any:
        from posttrain.models.peft.attach import NEW
        from posttrain.models.peft.shared import share

        share(model, NEW)
        return super()._ready(model)


class Ranked(Placed):
    """With a rank, which is a factor's smaller side: a layer is at least as wide."""

    r: Positive

    @property
    def least_width(self) -> int:
        return self.r * self.ranks_wide


class Targeted(Ranked):
    """With dropout of its input, too."""

    dropout: Dropout

    def check_continued(self, found: Any) -> None:
        check_same("r", found.r, self.r)

    def _ready(self, model: Any) -> Any:
        """With the dropout that was asked for: peft has one for all layers and none for experts, and a file keeps none."""
        from torch import nn

        from posttrain.models.peft.attach import NEW

        for module in model.modules():
            for kind in ("lora_dropout", "vera_dropout"):
                if NEW in getattr(module, kind, {}) and not hasattr(module, "parameter_name"):
                    getattr(module, kind)[NEW] = nn.Dropout(self.dropout) if self.dropout else nn.Identity()
        return super()._ready(model)


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


def check_same(key: str, found: float, asked: float) -> None:
    """Raises UserError where an adapter that is to be trained on has another value of a setting that its function depends on."""
    from posttrain.errors import UserError

    if abs(found - asked) > 1e-6 * abs(found):
        found = round(found) if abs(found - round(found)) < 1e-6 else found
        raise UserError(
            f"peft.{key}: the adapter that chain.mode=continue goes on with has {found}, not {asked}; say peft.{key}={found}"
        )


def check_places_continued(key: str, asked: set[str], found: set[str]) -> None:
    """Raises UserError where an adapter that is to be trained on is on other layers than the settings say."""
    from posttrain.errors import UserError

    if asked and asked != found:
        more, fewer = (", ".join(short_names(names)) for names in (asked - found, found - asked))
        differs = " and ".join(filter(None, (more and f"is not on {more}", fewer and f"is on {fewer} too")))
        names = f"[{','.join(short_names(found))}]" if key == "targets" else "the one it was made with"
        raise UserError(f"peft.{key}: the adapter that chain.mode=continue goes on with {differs}; say peft.{key}={names}")


def short_names(names: Iterable[str]) -> list[str]:
    """The last parts of names, of experts' parameters the last two."""
    return sorted({".".join(name.split(".")[-2 if ".experts." in f".{name}" else -1 :]) for name in names})


def adapted_names(model: Any) -> set[str]:
    """Names, in the base, of the layers with an adapter, and of parameters with one that are no `weight`."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    found = set()
    for name, module in model.get_base_model().named_modules():
        if isinstance(module, BaseTunerLayer) and not hasattr(module, "token_indices"):
            own: str = getattr(module, "parameter_name", "weight")
            plain = name.replace(".base_layer", "")
            found.add(plain if own == "weight" else f"{plain}.{own}")
    return found


def has_no_weights(model: Any) -> bool:
    """Is it on the meta device, where only shapes can be had?"""
    return next(model.parameters()).is_meta
