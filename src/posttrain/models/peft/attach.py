"""What a method (`peft=`) puts on a model, and what a finished run's adapter becomes underneath it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from posttrain.config import schema
from posttrain.errors import UserError
from posttrain.models.peft.partial import train_head, train_top
from posttrain.models.peft.targets import check_rank, is_transposed, matched, suffixes

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel

NEW, INIT = "default", "init"  # peft's names of the trained adapter and of the frozen one under it
TASK = "CAUSAL_LM"


def add_method(model: Any, method: schema.Method, num_steps: int = 1, task: str | None = TASK) -> nn.Module:
    """The model with what `method` trains, and all else frozen. num_steps: of the whole run, for a method with a schedule. task:
    peft's name of what the model does; None for what is no language model.

    A LoRA's change is zero at the start. Raises UserError for targets that match nothing and ranks that do not fit.
    """
    from peft import get_peft_model

    if isinstance(method, schema.Full):
        return model
    if isinstance(method, schema.Head):
        return train_head(model)
    if isinstance(method, schema.Partial):
        return train_top(model, method.layers)
    peft = get_peft_model(model, peft_config(model, method, num_steps, task), adapter_name=NEW)
    if isinstance(method, schema.Prompt) and method.init == "vocabulary":
        _start_from_words(peft)
    _cast(peft, method)
    return peft


def peft_config(model: Any, method: schema.Method, num_steps: int, task: str | None = TASK) -> Any:
    """peft's own description of `method`."""
    import peft

    if isinstance(method, schema.Prefix):
        # zero: random keys and values of the size that peft draws would drown the model's own
        return peft.PrefixTuningConfig(num_virtual_tokens=method.length, init_weights="zero", task_type=TASK)
    if isinstance(method, schema.Ptuning):
        return peft.PromptEncoderConfig(num_virtual_tokens=method.length, encoder_hidden_size=method.hidden, task_type=TASK)
    if isinstance(method, schema.Prompt):
        return peft.PromptTuningConfig(num_virtual_tokens=method.length, task_type=TASK)
    if isinstance(method, schema.Bottleneck):
        from posttrain.models.peft.bottleneck import BottleneckConfig, output_projections

        layers = output_projections(model, method.placement)
        return BottleneckConfig(r=method.r, target_modules=suffixes(layers, model), task_type=TASK)
    assert isinstance(method, schema.Targeted)
    return _targeted_config(model, method, num_steps, task)


def _targeted_config(model: Any, method: schema.Targeted, num_steps: int, task: str | None) -> Any:
    import peft

    layers = matched(model, method.targets)
    common: dict[str, Any] = {
        "target_modules": suffixes(layers, model), "task_type": task, "fan_in_fan_out": is_transposed(layers)
    }  # fmt: skip
    if isinstance(method, schema.Vera):
        return peft.VeraConfig(
            r=method.r, vera_dropout=method.dropout, d_initial=method.d_initial, projection_prng_key=method.seed, **common
        )
    assert isinstance(method, schema.Lora | schema.LoraPlus | schema.Dora | schema.AdaLora)
    common |= {"lora_alpha": whole_number(method.alpha), "lora_dropout": method.dropout}
    if isinstance(method, schema.AdaLora):
        check_rank("peft.init_r", method.init_r, layers)
        return peft.AdaLoraConfig(
            target_r=method.r, init_r=method.init_r, total_step=num_steps, tinit=int(method.start * num_steps),
            tfinal=int(method.end * num_steps), deltaT=1, orth_reg_weight=method.orthogonality, **common,
        )  # fmt: skip
    check_rank("peft.r", method.r, layers)
    if method.method == "pissa":
        common["init_lora_weights"] = "pissa_niter_16"  # a randomised SVD: exact ones of large matrices take minutes
    return peft.LoraConfig(r=method.r, use_rslora=method.method == "rslora", use_dora=method.method == "dora", **common)


def lr_ratio(method: schema.Method, name: str) -> float:
    """By what a parameter's learning rate differs from the method's: LoRA+ has its B learn faster than its A."""
    return method.lr_ratio if isinstance(method, schema.LoraPlus) and ".lora_B." in name else 1.0


def add_frozen(model: PeftModel, adapter_dir: Path) -> None:
    """Put a finished run's adapter, frozen, under the new one: h = W0 x + init(x) + new(x)."""
    put_beside(model, adapter_dir, INIT)
    tuner: Any = model.base_model
    tuner.set_adapter([INIT, NEW])
    for name, parameter in model.named_parameters():
        if f".{INIT}." in name:
            parameter.requires_grad_(False)


def put_beside(model: PeftModel, adapter_dir: Path, name: str) -> None:
    """Another adapter, frozen, that speaks only where it is called for by its name. Random numbers stay as they were."""
    from peft import load_peft_weights, set_peft_model_state_dict

    before = torch.get_rng_state()
    model.add_adapter(name, _config_of(adapter_dir))
    torch.set_rng_state(before)  # peft initialises at random what is then loaded
    set_peft_model_state_dict(model, load_peft_weights(str(adapter_dir), device="cpu"), adapter_name=name)
    for parameter_name, parameter in model.named_parameters():
        if f".{name}." in parameter_name:
            parameter.requires_grad_(False)


def _config_of(adapter_dir: Path) -> Any:
    """A saved adapter's description, of a reward model's without its head: that is no part of the language model."""
    from peft import PeftConfig

    config: Any = PeftConfig.from_pretrained(str(adapter_dir))
    if config.task_type == "SEQ_CLS":
        config.task_type, config.modules_to_save = TASK, None
    return config


def load_adapter(model: PreTrainedModel, adapter_dir: Path, is_trainable: bool = False) -> PeftModel:
    """A run's adapter on its base, by peft; it knows our own method too."""
    from peft import PeftModel

    import posttrain.models.peft.bottleneck  # noqa: F401 (registers it)

    config = _config_of(adapter_dir)
    config.inference_mode = not is_trainable
    return PeftModel.from_pretrained(model, str(adapter_dir), adapter_name=NEW, is_trainable=is_trainable, config=config)


def continue_adapter(model: PreTrainedModel, method: schema.Method, adapter_dir: Path) -> PeftModel:
    """A finished run's adapter, trained on. Raises UserError where `method` describes another one."""
    if isinstance(method, schema.Prefix | schema.Prompt):
        return _continue_prompt(model, method, adapter_dir)
    peft = load_adapter(model, adapter_dir, is_trainable=True)
    config: Any = peft.peft_config[NEW]
    rank = getattr(method, "r", None)
    if isinstance(method, schema.Targeted) and config.r != rank:
        raise UserError(
            f"peft.r: the adapter that chain.mode=continue goes on with has rank {config.r}, not {rank}; say peft.r={config.r}"
        )
    _cast(peft, method)
    return peft


def _continue_prompt(model: PreTrainedModel, method: schema.Prefix | schema.Prompt, adapter_dir: Path) -> PeftModel:
    """peft loads no prompt for training: a new one takes the finished one's numbers."""
    from peft import PeftConfig, load_peft_weights, set_peft_model_state_dict

    length = PeftConfig.from_pretrained(str(adapter_dir)).num_virtual_tokens  # pyright: ignore
    if length != method.length:
        raise UserError(f"peft.length: init's has {length} virtual tokens, not {method.length}; say peft.length={length}")
    peft: Any = add_method(model, method)
    set_peft_model_state_dict(peft, load_peft_weights(str(adapter_dir), device="cpu"), adapter_name=NEW)
    return peft


def merge_into(model: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """W0 + (alpha/r) B A in place of W0."""
    merged: Any = load_adapter(model, adapter_dir).merge_and_unload()  # pyright: ignore
    return merged.requires_grad_(True)  # peft has frozen the base


def whole_number(value: float) -> Any:
    """peft's annotations say int, its arithmetic takes any number."""
    return round(value) if abs(value - round(value)) < 1e-9 else value


def _cast(model: PeftModel, method: schema.Method) -> None:
    assert isinstance(method, schema.Adapted)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(getattr(torch, method.dtype))


def _start_from_words(model: PeftModel) -> None:
    """Soft tokens begin as embeddings of words drawn from the vocabulary (Lester et al. 2021, section 3.2)."""
    base: Any = model.get_base_model()
    words: Any = base.get_input_embeddings()
    soft: Any = model.prompt_encoder[NEW].embedding  # pyright: ignore
    drawn = torch.randint(words.num_embeddings, (soft.num_embeddings,), device=words.weight.device)
    with torch.no_grad():
        soft.weight.copy_(words(drawn))
