"""The classes that transformers lists as causal or as image-text-to-text, each as a directory with a tiny random model."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import CONFIG_MAPPING
from transformers.models.auto import modeling_auto
from transformers.utils import logging

from architectures.exceptions import NOT_MADE
from architectures.shrink import tiny_keywords
from architectures.tokens import make_tokenizer

# What people also give as model.name, and what only can be refused: by the class that it is released as
RELEASED_AS = {
    "t5": "T5ForConditionalGeneration", "bart": "BartForConditionalGeneration", "bert": "BertForMaskedLM",
    "roberta": "RobertaForMaskedLM", "modernbert": "ModernBertForMaskedLM", "whisper": "WhisperForConditionalGeneration",
}  # fmt: skip
LARGEST = 9_000_000  # parameters; more is no tiny model, and the shrinker has missed a key


class NotTiny(Exception):
    """Why a class cannot be made tiny, or not run on text alone, in a few words."""


@dataclass(frozen=True)
class Architecture:
    """kind: its model_type. mapping: causal | vision | other, as transformers lists it."""

    name: str
    kind: str
    class_name: str
    mapping: str

    def config(self) -> Any:
        """Of transformers, tiny. Raises NotTiny."""
        if reason := NOT_MADE.get(self.name, NOT_MADE.get(self.class_name)):
            raise NotTiny(reason)
        try:
            config = CONFIG_MAPPING[self.kind](**tiny_keywords(CONFIG_MAPPING[self.kind]))
        except Exception as error:
            raise NotTiny(_line(error)) from error
        wanted = getattr(transformers, self.class_name).config_class
        text = config.get_text_config(decoder=True)
        return text if isinstance(text, wanted) and not isinstance(config, wanted) else config

    def make(self, directory: Path, seed: int = 0) -> Any:
        """The model, written to `directory` with a tokenizer; float32, in evaluation mode. Raises NotTiny."""
        config = self.config()
        made = getattr(transformers, self.class_name)
        try:
            with torch.device("meta"):
                size = sum(parameter.numel() for parameter in made._from_config(config).parameters())
            if size > LARGEST:
                raise NotTiny(f"{size:,} parameters are left")
            torch.manual_seed(seed)
            model = made._from_config(config, dtype=torch.float32).eval()
            _enlarge(model)
            _run_once(model)
            model.save_pretrained(directory)
        except (ImportError, TypeError, ValueError, RuntimeError, AttributeError, LookupError, AssertionError) as error:
            raise NotTiny(_line(error)) from error
        make_tokenizer().save_pretrained(directory)
        return model


def architectures() -> list[Architecture]:
    """Every class once: the causal ones, the text of image-text-to-text ones, and some releases that are neither."""
    causal = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    found = [Architecture(kind, kind, name, "causal") for kind, name in causal.items()]
    for kind, name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.items():
        if causal.get(kind) != name:
            found.append(Architecture(f"{kind}+vision" if kind in causal else kind, kind, name, "vision"))
    return found + [Architecture(f"{kind} (as released)", kind, name, "other") for kind, name in RELEASED_AS.items()]


def quiet() -> None:
    """Nothing of transformers' own talk."""
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def _enlarge(model: Any) -> None:
    """Weights so large that a token changes what the others say: a leak shows, and so does a layer that is left out."""
    left = ("embed", "conv", "vision", "visual", "A_log")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 and parameter.shape[-1] >= 8 and not any(word in name for word in left):
                parameter.mul_(4.0)
            if "sinks" in name:
                parameter.normal_()


@torch.no_grad()
def _run_once(model: Any) -> None:
    """Raises where the class does not run on a row of text alone."""
    row = torch.arange(64, 84)[None]
    if model.config.is_encoder_decoder:
        return
    logits = model(input_ids=row, use_cache=False).logits
    if logits.shape[:2] != row.shape or not logits.isfinite().all():
        raise ValueError(f"a row of text gives {list(logits.shape)} logits, or infinite ones")


def _line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {(lines or ['no message'])[-1 if 'validator' in lines[0] else 0]}"[:200]
