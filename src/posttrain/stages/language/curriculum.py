"""The order of a curriculum: how hard each unit of the data is, by its length or to the model that the stage is given."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from posttrain.batch import PackedBatch
from posttrain.config.schema import Guarded, LanguageStage
from posttrain.console import Meter, say
from posttrain.data.examples import Examples
from posttrain.data.mixture import make_sampler
from posttrain.data.queues import Curriculum
from posttrain.devices.out_of_memory import in_parts, in_two
from posttrain.evaluation.held_out import EVAL_TOKENS, by_tokens
from posttrain.losses.tokens import answer_sums
from posttrain.runs.identity import content_hash
from posttrain.stages.language.prepare import PreparedData, with_order
from posttrain.stages.steps import Context, Session
from posttrain.training.objective import Objective


def apply_curriculum(
    context: Context, data: PreparedData, session: Session, objective: Objective[PackedBatch]
) -> tuple[PreparedData, NDArray[np.floating] | None]:
    """The data in the order of `curriculum.by`, for which the model may be asked how hard the rows are to it, and the difficulty
    of every unit. As it was, and None, where there is no curriculum."""
    cfg: LanguageStage = context.cfg
    if not isinstance(cfg, Guarded) or not cfg.curriculum.by:
        return data, None
    train = data.data.train
    if cfg.curriculum.by == "length":
        difficulty = train.unit_lengths()
    else:
        key, name = content_hash(data.function(cfg), data.data.key, str(context.device)), "difficulty"
        make = partial(perplexities, session.module, train, objective, context.device, context.check)
        difficulty = session.cached(name, key, lambda: {name: make()})[name].numpy()
    asked = cfg.curriculum
    curriculum = Curriculum(difficulty, asked.beta_start, asked.beta_end, asked.every_row)
    order = make_sampler(data.data, cfg.data, cfg.train, context.processes, curriculum)
    never = min(len(train), len(order.drawn)) - len(np.unique(order.drawn))
    if never and not asked.every_row:
        say(f"curriculum: {never:,} of {len(train):,} units are never drawn, others again (curriculum.every_row=true: each once)")
    return with_order(data, order), difficulty


def perplexities(
    module: nn.Module, examples: Examples, objective: Objective[PackedBatch], device: torch.device, check: Callable[[], None]
) -> Tensor:
    """float32 [units]: mean loss of a unit's counting tokens, in nats (the logarithm of its perplexity)."""
    module.eval()
    batches = list(by_tokens(examples, EVAL_TOKENS))
    found: list[Tensor] = []

    def read(units: list[int]) -> Tensor:
        batch = objective.pack(examples, units).to(device)
        both = torch.stack([-batch.weight * module(batch), batch.weight])
        losses, weights = (answer_sums(each, batch.sequence_id, batch.num_answers).cpu() for each in both)
        answers = [len(examples.sequences(unit)) * batch.num_answers // _sequences(examples, units) for unit in units]
        owner = torch.repeat_interleave(torch.arange(len(units)), torch.tensor(answers))
        total, count = (torch.zeros(len(units)).index_add(0, owner, each) for each in (losses, weights))
        return total / count.clamp(min=1e-9)

    with Meter("difficulty", len(batches)) as meter, torch.no_grad():
        for units in batches:
            found += in_parts(read, units, in_two, "difficulty")
            meter.advance()
            check()
    return torch.cat(found).float()


def _sequences(examples: Examples, units: list[int]) -> int:
    return sum(len(examples.sequences(unit)) for unit in units)
