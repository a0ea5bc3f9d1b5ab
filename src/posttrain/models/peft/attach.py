"""A method (`peft=`) on a model, and what a finished run's adapter becomes underneath it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.config.interfaces import Method
from posttrain.errors import UserError, reading
from posttrain.models.language.new_tokens import make_room
from posttrain.models.peft.kinds import kind_of
from posttrain.models.peft.names import in_memory, todays_names, with_layers
from posttrain.models.peft.quantized import read_packed
from posttrain.models.peft.shared import check_shared, silence_followers
from posttrain.models.peft.tokens import size_of, without_rows
from posttrain.models.peft.whole import check_whole, fitting

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NEW, INIT = "default", "init"  # peft's names of the trained adapter and of the frozen one under it
TASK = "CAUSAL_LM"


def add_method(model: Any, method: Method, num_steps: int = 1, task: str | None = TASK) -> nn.Module:
    """The model with what `method` trains, and all else frozen: `Method.attach` of a language model, for one step.

    A LoRA's change is zero at the start. Raises UserError for targets that match nothing and ranks that do not fit.
    """
    return method.attach(model, num_steps, task)


def add_frozen(model: PeftModel, adapter_dir: Path) -> None:
    """Put a finished run's adapter, frozen, under the new one: h = W0 x + init(x) + new(x)."""
    put_beside(model, adapter_dir, INIT)
    tuner: Any = model.base_model
    tuner.set_adapter([INIT, NEW])
    for name, parameter in model.named_parameters():
        if f".{INIT}." in name:
            parameter.requires_grad_(False)


def put_beside(model: PeftModel, adapter_dir: Path, name: str) -> None:
    """Another adapter, frozen, that speaks only where it is called for by its name. Random numbers stay as they were.

    Its rows of the embedding, if it has such, are those that the base has in memory (see peft/tokens.py).
    """
    from peft import load_peft_weights, set_peft_model_state_dict

    config, saved = _config_of(adapter_dir), _saved(adapter_dir)
    weights = without_rows(model, config, load_peft_weights(str(adapter_dir), device="cpu"))
    before = torch.get_rng_state()
    with todays_names():
        model.add_adapter(name, _fitting(config, model))
    read_packed(model)
    torch.set_rng_state(before)  # peft initialises at random what is then loaded
    tensors = in_memory(model, saved, weights)
    with todays_names(), fitting(adapter_dir):
        set_peft_model_state_dict(model, tensors, adapter_name=name)
        check_whole(model, name, tensors, adapter_dir)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)


def _fitting(config: Any, model: PeftModel) -> Any:
    """The description of another adapter for a model with one. Raises UserError where both are on parameters, of other names."""
    fitting = with_layers(config, model.get_base_model())
    asked = set(getattr(fitting, "target_parameters", None) or ())
    for other in model.peft_config.values():
        there = set(getattr(other, "target_parameters", None) or ())
        if asked and there and asked != there:
            odd = sorted(asked ^ there)[0]
            raise UserError(
                f"peft.targets: two adapters on experts must be on the same ones, and only one is on {odd}; merge one first"
            )
    return fitting


def _saved(adapter_dir: Path) -> dict[str, Any]:
    return json.loads((adapter_dir / "adapter_config.json").read_text(encoding="utf-8"))


def _config_of(adapter_dir: Path) -> Any:
    """A saved adapter's description, of a reward model's without its head: that is no part of the language model."""
    from peft import PeftConfig

    if kind := kind_of(_saved(adapter_dir)):
        kind.register()
    with reading(f"init: the adapter's description in {adapter_dir} cannot be read", "give a whole adapter"):
        config: Any = PeftConfig.from_pretrained(str(adapter_dir))
    if config.task_type == "SEQ_CLS":
        config.task_type, config.modules_to_save = TASK, None
    return config


def load_adapter(model: PreTrainedModel, adapter_dir: Path, is_trainable: bool = False) -> PeftModel:
    """A run's adapter on its base, by peft."""
    from peft import get_peft_model, load_peft_weights, set_peft_model_state_dict

    config, saved = _config_of(adapter_dir), _saved(adapter_dir)
    if size := size_of(adapter_dir):
        make_room(model, size)
    config.inference_mode = not is_trainable
    if not saved.get("target_parameters"):
        from peft import PeftModel

        with fitting(adapter_dir):
            found = PeftModel.from_pretrained(model, str(adapter_dir), adapter_name=NEW, is_trainable=is_trainable, config=config)
        check_whole(found, NEW, in_memory(found, saved, load_peft_weights(str(adapter_dir), device="cpu")), adapter_dir)
        return found
    with todays_names():
        made: Any = get_peft_model(model, with_layers(config, model), adapter_name=NEW)
    read_packed(made)
    tensors = in_memory(made, saved, load_peft_weights(str(adapter_dir), device="cpu"))
    with todays_names(), fitting(adapter_dir):
        set_peft_model_state_dict(made, tensors, adapter_name=NEW)
        check_whole(made, NEW, tensors, adapter_dir)
    return made if is_trainable else made.eval()


def merge_into(model: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """W0 + (alpha/r) B A in place of W0."""
    loaded: Any = load_adapter(model, adapter_dir)
    check_shared(loaded, NEW)
    silence_followers(loaded)
    merged = loaded.merge_and_unload()
    return merged.requires_grad_(True)  # peft has frozen the base
