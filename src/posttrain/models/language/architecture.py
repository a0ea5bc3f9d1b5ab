"""Which class of transformers a checkpoint is: asked of its config, before any weight is loaded."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    AutoModelForMultimodalLM,
    AutoModelForSequenceClassification,
    PretrainedConfig,
)

from posttrain.errors import UserError, reading
from posttrain.models.language.decoder import decoder_of
from posttrain.models.trust import may_run_code


def config_of(directory: Path, code: str | None) -> PretrainedConfig:
    """The config of a checkpoint's directory. code: as `may_run_code` takes it. Raises UserError for one that transformers does
    not know."""
    with reading(f"model.name: the config in {directory} cannot be read", "give a config.json made by save_pretrained"):
        found = AutoConfig.from_pretrained(directory, trust_remote_code=may_run_code(directory, code))
        " ".join(found.architectures or ())  # which transformers does not check
        return found


def model_class(config: PretrainedConfig) -> Any:
    """The auto class that loads all of a checkpoint with this config: its towers too, where it has such.

    Many configs of images and text have a class for the text alone, which AutoModelForCausalLM takes. It would load the half of
    a checkpoint that names the whole one.
    """
    named = set(config.architectures or ())
    if type(config) not in _known(AutoModelForMultimodalLM) or named & {
        name.__name__ for name in _classes(AutoModelForCausalLM, config)
    }:
        return AutoModelForCausalLM
    return AutoModelForMultimodalLM


def outside_text(model: Any) -> dict[str, nn.Parameter]:
    """The parameters that text does not run through, by name: towers of pictures and sound, what joins them to the language
    model, and layers within it that attend to pictures alone. They stay as they are."""
    config = model.config.get_text_config() if hasattr(model, "get_decoder") else None
    if config is None or config is model.config:
        return {}
    decoder = decoder_of(model)
    blocks: Any = next((m for m in decoder.modules() if isinstance(m, nn.ModuleList)), nn.ModuleList())
    of_pictures = {
        id(p) for i in getattr(config, "cross_attention_layers", None) or () if i < len(blocks) for p in blocks[i].parameters()
    }
    parts = (decoder, model.get_input_embeddings(), model.get_output_embeddings())
    of_text = {id(p) for part in parts if part is not None for p in part.parameters()} - of_pictures
    return {name: p for name, p in model.named_parameters() if id(p) not in of_text}


def towers(model: Any) -> dict[str, int]:
    """Which parts of the model `outside_text` are, as names from the model's root, and how many parameters each has."""
    found: dict[str, int] = {}
    inner = decoder_of(model)
    decoder = next((f"{name}." for name, m in model.named_modules() if m is inner), "")
    for name, parameter in outside_text(model).items():
        depth = next(i for i, part in enumerate([*decoder.split("."), ""]) if name.split(".")[i] != part)
        part = "cross-attention layers" if name.startswith(decoder) else ".".join(name.split(".")[: depth + 1])
        found[part] = found.get(part, 0) + parameter.numel()
    return found


def require_causal(config: PretrainedConfig, name: str) -> None:
    """Raises UserError, in one line, for a model that does not write from left to right, and for one that has no class."""
    kind, named = str(config.model_type), " ".join(config.architectures or ())
    if "diffusion" in kind or any(word in named for word in ("Diffusion", "LLaDA", "DreamModel")):
        what = "a diffusion language model, which fills in masked tokens"
    elif config.is_encoder_decoder:
        what = "an encoder-decoder, which writes after another text that it has read whole"
    elif type(config) in _known(AutoModelForMaskedLM) and not getattr(config, "is_decoder", False):
        what = "an encoder, whose every token sees those after it"
    elif getattr(config, "auto_map", None) or any(
        type(config) in _known(auto) for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM)
    ):
        return
    else:
        what = "of no class for language modelling in transformers"
    raise UserError(f"model.name: '{name}' ({kind}) is {what}; give a causal language model, such as model=smollm2")


def classifier_of(config: PretrainedConfig) -> Any:
    """transformers' class for sequence classification, where a reward model can be saved as it: its weights are those of the
    language model and one `score`. Without weights, on the meta device; None where there is no such class."""
    ours = any(type(config) in _known(auto) for auto in (AutoModelForCausalLM, AutoModelForMultimodalLM))
    if not ours or type(config) not in _known(AutoModelForSequenceClassification):
        return None
    config = copy.deepcopy(config)
    config.num_labels = 1
    vars(config).pop("quantization_config", None)  # shapes alone are asked for
    with torch.device("meta"):
        classifier = AutoModelForSequenceClassification.from_config(config)
        ours = model_class(config).from_config(config).state_dict()
    theirs = classifier.state_dict()
    head = theirs.pop("score.weight", None)
    width = config.get_text_config().hidden_size
    return classifier if head is not None and head.shape == (1, width) and theirs.keys() <= ours.keys() else None


def _known(auto: Any) -> Any:
    """The configs that an auto class has a model for."""
    return auto._model_mapping.keys()


def _classes(auto: Any, config: PretrainedConfig) -> tuple[Any, ...]:
    """The models that an auto class has for a config."""
    found = auto._model_mapping[type(config)] if type(config) in _known(auto) else ()
    return found if isinstance(found, tuple) else (found,)
