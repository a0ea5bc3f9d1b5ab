"""What a plan must know of a language stage beyond model and data: nothing, unless a stage's own plan.py says otherwise."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import nn

from posttrain.config.schema import LanguageStage
from posttrain.data.examples import Examples
from posttrain.models.language.packed_lm import PackedLM


@dataclass(frozen=True)
class Extra:
    """memory: bytes by part, beside what every run has. passes: forward and backward passes over each token that is drawn.
    notes: what the plan assumes. trained, total: parameters of what is in memory beside the model that is trained."""

    memory: dict[str, float] = field(default_factory=dict[str, float])
    passes: float = 1.0
    notes: list[str] = field(default_factory=list[str])
    trained: int = 0
    total: int = 0


def unit_tokens(cfg: LanguageStage, examples: Examples) -> NDArray[np.int64]:
    """int64 [units]: tokens that each unit will be, at most."""
    return examples.unit_tokens()


def extra(cfg: LanguageStage, units: int, parts: dict[str, float], model: Any, base: str) -> Extra:
    """units: of the data. parts: bytes of the policy's own parts. model: transformers' config. base: where the base is."""
    return Extra()


def trained_module(cfg: LanguageStage, lm: PackedLM) -> nn.Module:
    """What the optimizer will see, by the names that `optim.lr_groups` looks for, on the meta device. lm: the language model with
    its method."""
    return lm
