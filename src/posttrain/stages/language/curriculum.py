"""How hard each unit of the data is to the model that a stage is given: its loss on it, computed once and kept."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from torch import nn

from posttrain.console import Meter
from posttrain.data.examples import Examples
from posttrain.evaluation.held_out import EVAL_TOKENS, Task, by_tokens
from posttrain.losses.tokens import answer_sums


def perplexities(
    module: nn.Module,
    examples: Examples,
    task: Task,
    device: torch.device,
    path: Path,
    is_writer: bool,
    check: Callable[[], None],
) -> NDArray[np.float32]:
    """float32 [units]: mean loss of a unit's counting tokens, in nats (the logarithm of its perplexity)."""
    if path.exists():
        return load_file(path)["difficulty"]
    module.eval()
    batches = list(by_tokens(examples, EVAL_TOKENS))
    found = []
    with Meter("difficulty", len(batches)) as meter, torch.no_grad():
        for units in batches:
            batch = task.pack(examples, units).to(device)
            both = torch.stack([-batch.weight * module(batch), batch.weight])
            losses, weights = (answer_sums(each, batch.sequence_id, batch.num_answers).cpu() for each in both)
            answers = [len(examples.sequences(unit)) * batch.num_answers // _sequences(examples, units) for unit in units]
            owner = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(answers))
            total, count = (torch.zeros(len(units)).index_add(0, owner, each) for each in (losses, weights))
            found.append((total / count.clamp(min=1e-9)).numpy())
            meter.advance()
            check()
    difficulty = np.concatenate(found).astype(np.float32)
    if is_writer:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        save_file({"difficulty": difficulty}, temporary)
        temporary.replace(path)
    return difficulty


def _sequences(examples: Examples, units: list[int]) -> int:
    return sum(len(examples.sequences(unit)) for unit in units)
