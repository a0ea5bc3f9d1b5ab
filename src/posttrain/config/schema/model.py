"""The model, what is trained of it, and how its frozen part is kept."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, Union

from pydantic import Field, field_validator, model_validator

from posttrain.config.choices import Kernels
from posttrain.config.fields import Strict
from posttrain.config.interfaces import METHODS, QUANTIZERS, Method, Quantizer
from posttrain.runs.files import code_digest

PINS = r"[0-9a-f]{40}|[0-9a-f]{64}"  # a commit, or the digest of a directory's code


class ModelConfig(Strict):
    """`model`: the base."""

    name: str  # a hub id, a directory, or one made by the tool: tiny, smollm2
    revision: str | None
    dtype: Literal["auto", "float32", "bfloat16", "float16"]  # auto: bfloat16 if the base is frozen, float32 if it is trained


class LanguageModel(ModelConfig):
    """`model` of language models."""

    attention: Literal["auto", "varlen", "flex", "documents", "dense"]  # auto: the first that can be had; see the YAML
    kernels: Kernels  # reference: the plain modules of transformers and peft
    chat_template: str | None  # a file, or chatml; None: the tokenizer's own
    trust_remote_code: bool
    ignore_unexpected: bool  # leave tensors out that the model has no place for
    add_tokens: list[str] | None  # put into the tokenizer where they are not; their rows of embedding and head are trained

    @model_validator(mode="after")
    def _code_is_pinned(self) -> LanguageModel:
        if not self.trust_remote_code or re.fullmatch(PINS, self.revision or ""):
            return self
        if (directory := Path(self.name).expanduser()).is_dir():
            found = f"model.revision={code_digest(directory)}"
            raise ValueError(f"model.trust_remote_code: read the *.py files of {self.name} and pin them by their digest, {found}")
        raise ValueError("model.trust_remote_code: code from the hub needs model.revision=, a commit of 40 hex digits")

    @field_validator("add_tokens")
    @classmethod
    def _tokens_are_texts(cls, tokens: list[str] | None) -> list[str] | None:
        if tokens is not None and (len(set(tokens)) < len(tokens) or not all(token.strip() for token in tokens)):
            raise ValueError("model.add_tokens: each token must be a text of its own, and not only spaces")
        return tokens or None


# of what the registries find: a method and a quantizer is a file each, in models/
if TYPE_CHECKING:
    PeftConfig = Method
    QuantConfig = Quantizer
else:
    PeftConfig = Annotated[Union[tuple(METHODS.all().values())], Field(discriminator="method")]  # noqa: UP007
    QuantConfig = Annotated[Union[tuple(QUANTIZERS.all().values())], Field(discriminator="method")]  # noqa: UP007


class ChainConfig(Strict):
    """`chain`: what becomes of the adapter that init brings."""

    mode: Literal["auto", "stack", "merge", "continue"]
