"""How far two models agree on held-out rows, one of them in memory at a time."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.config.stages import REGISTRY, typed_config
from posttrain.config.stored import completed
from posttrain.console import say
from posttrain.data.examples import Examples
from posttrain.data.prepare import held_out_of, prepare, prepare_set
from posttrain.errors import UserError
from posttrain.models.language.loading import LoadedModel
from posttrain.runs.cache_place import cache_root

ROWS, LENGTH, TOKENS = 32, 256, 1024  # enough to tell models apart; every position costs a row of the vocabulary
CALIBRATION = 32768  # tokens


@dataclass(frozen=True)
class Agreement:
    """kl: mean KL(live || other) in nats a token. top1: share of positions with the same likeliest token. perplexity: of both."""

    kl: float
    top1: float
    perplexity_live: float
    perplexity: float


def held_out_rows(run: Path, live: LoadedModel) -> list[Tensor]:
    """Sequences int64 [T] of at most TOKENS tokens in all: half of general text, half of what the run held out itself.

    live: the run's result, of load_model."""
    encoder = live.encoder
    sources = [prepare_set("builtin:general", ROWS, encoder, LENGTH).examples]
    if live.artifact.config is None:
        say("what the adapter was trained on is not known: general text is used alone")
        return _of(sources, live)
    settings = completed(live.artifact.config)
    try:
        cfg = typed_config(settings)
        data, rows = cfg.data, REGISTRY.get(cfg.stage).rows_of(cfg)
        sources.append(held_out_of(data, rows, encoder, settings["train"]["max_length"], cache_root()))
    except (UserError, ValidationError) as error:
        say(f"the run's own rows cannot be read again, general text is used alone ({str(error).splitlines()[0]})")
    return _of(sources, live)


def trained_rows(live: LoadedModel) -> list[Tensor]:
    """Sequences int64 [T] of what a run was trained on, CALIBRATION tokens at most; general text where that cannot be read."""
    length = _length(live)
    try:
        if live.artifact.config is None:
            raise UserError("what the adapter was trained on is not known")
        settings = completed(live.artifact.config)
        cfg = typed_config(settings)
        use = REGISTRY.get(cfg.stage).rows_of(cfg)
        parts = prepare(cfg.data, use, live.encoder, settings["train"]["max_length"], cache_root())
        return [row for part in parts for row in _first_tokens(part.train, CALIBRATION // len(parts), length)]
    except (UserError, ValidationError) as error:
        say(f"the run's own rows cannot be read again, general text calibrates ({str(error).splitlines()[0]})")
        return _first_tokens(prepare_set("builtin:general", 4 * ROWS, live.encoder, LENGTH).examples, CALIBRATION, length)


def _length(live: LoadedModel) -> int:
    """Of a row, at most."""
    config = live.model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or LENGTH
    return min(LENGTH, context)


def _of(sources: list[Examples], live: LoadedModel) -> list[Tensor]:
    """As many tokens of each source."""
    return [row for source in sources for row in _first_tokens(source, TOKENS // len(sources), _length(live))]


def _first_tokens(examples: Examples, count: int, length: int) -> list[Tensor]:
    """Rows of at most `length` tokens, `count` in all."""
    rows, left = [], count
    for i in range(len(examples.rows)):
        tokens = torch.from_numpy(examples.sequence(i)[0].astype("int64"))[: min(length, left)]
        if len(tokens) > 1:
            rows.append(tokens)
            left -= len(tokens)
        if left < 2:
            break
    return rows


@torch.no_grad()
def write_logprobs(model: Any, rows: list[Tensor], path: Path) -> None:
    """float32 log-probs [T, V] of every row, on disk, to compare with after the model is freed."""
    save_file({f"{i:04d}": _logprobs(model, row) for i, row in enumerate(rows)}, path)


@torch.no_grad()
def agreement(path: Path, model: Any, rows: list[Tensor]) -> Agreement:
    """Agreement of `model` with the live model, whose log-probs are at `path`."""
    kl, same, count, losses = 0.0, 0, 0, [0.0, 0.0]
    predicted = 0
    live_rows = load_file(path)
    for i, row in enumerate(rows):
        live, other = live_rows[f"{i:04d}"], _logprobs(model, row)
        kl += float((live.double().exp() * (live.double() - other.double())).sum())
        same += int((live.argmax(-1) == other.argmax(-1)).sum())
        count += len(row)
        for which, logps in enumerate((live, other)):
            losses[which] -= float(logps[:-1].gather(1, row[1:, None]).double().sum())
        predicted += len(row) - 1
    return Agreement(kl / count, same / count, *(math.exp(loss / predicted) for loss in losses))


def _logprobs(model: Any, row: Tensor) -> Tensor:
    logits = model(input_ids=row[None].to(model.device), use_cache=False).logits[0, -len(row) :]  # soft tokens come before
    return logits.float().log_softmax(-1).cpu()
