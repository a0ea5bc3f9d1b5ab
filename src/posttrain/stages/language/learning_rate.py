"""`optim.lr=auto`: the rate that is usual for a method, width, batch and number of steps. docs/tuning.md has the sources."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.config.schema import LanguageStage
from posttrain.errors import UserError, reading

FULL = 2.5  # times full_lr, which is 2e-5 for sft: 5e-5 at the width of 2000
WIDTH, BATCH = 2000, 128  # at which the rates of the rule were found
LLAMA = 0.781  # exponents of the width
EXPONENTS = {"qwen": 0.0775}  # by the beginning of model_type; all others as Llama


@dataclass(frozen=True)
class AutoRate:
    """line: what it is made of, in a run's first lines."""

    value: float
    line: str


def auto_rate(cfg: LanguageStage, num_steps: int, processes: int, base: Path) -> AutoRate:
    """The rate of a run of so many steps from the base in a directory, whose config.json is read, to three digits.

    Raises UserError where that has no width.
    """
    file = base / "config.json"
    with reading(f"model.name: {file} cannot be read", "give one made by save_pretrained"):
        config: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    width, kind = next((config[k] for k in ("hidden_size", "n_embd", "d_model") if config.get(k)), None), config["model_type"]
    if width is None:
        raise UserError(f"optim.lr: auto goes by the model's width, which {file} does not say; give a number")
    batch = cfg.train.batch_size * cfg.train.grad_accum * processes
    exponent, whose = next(((e, k) for k, e in EXPONENTS.items() if kind.startswith(k)), (LLAMA, "llama"))
    factors = {
        f"full training at width {WIDTH}": FULL * cfg.full_lr,
        cfg.peft.name: cfg.peft.lr_factor,
        **cfg.peft.auto_factors(num_steps),
        f"optim={cfg.optim.name}": cfg.optim.lr_factor,
        f"width {width}, as {whose}": (WIDTH / width) ** exponent,
        f"batch {batch}": (batch / BATCH) ** 0.25,
    }
    value = float(f"{math.prod(factors.values()):.3g}")
    made = " x ".join(f"{factor:.3g} ({what})" for what, factor in factors.items() if factor != 1)
    return AutoRate(value, f"optim.lr=auto: {value:g} = {made}; a rule (docs/tuning.md); posttrain tune finds a better one")
