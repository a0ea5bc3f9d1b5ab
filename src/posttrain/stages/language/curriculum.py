"""How hard each unit of the data is to the model that a stage is given: its loss on it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from posttrain.console import Meter
from posttrain.data.examples import Examples
from posttrain.evaluation.held_out import EVAL_TOKENS, Task, by_tokens
from posttrain.losses.tokens import answer_sums


def perplexities(module: nn.Module, examples: Examples, task: Task, device: torch.device, check: Callable[[], None]) -> Tensor:
    """float32 [units]: mean loss of a unit's counting tokens, in nats (the logarithm of its perplexity)."""
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
            found.append(total / count.clamp(min=1e-9))
            meter.advance()
            check()
    return torch.cat(found).float()


def _sequences(examples: Examples, units: list[int]) -> int:
    return sum(len(examples.sequences(unit)) for unit in units)
