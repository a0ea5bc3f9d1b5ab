"""Dynamic sampling (Yu et al. 2025, arXiv 2503.14476, section 3.2): prompts are drawn anew until enough of them have answers of
different reward, the only ones that teach something."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from posttrain.losses.advantages import told_apart
from posttrain.stages.ppo.rollout import Written

Figures = dict[str, float]


def drawn_until_full(
    draws: Iterator[Written], shaped: Callable[[Written], Tensor], wanted: int, size: int
) -> tuple[Written, Figures]:
    """The first `wanted` prompts whose answers differ in their shaped reward [A], or as many as there are in all draws; where
    there is none, the first draw as it is. And the figures of all that were drawn: of those that are kept a mean reward says
    little.

    size: prompts of a micro-batch.
    """
    drawn: list[Written] = []
    rewards, apart = list[Tensor](), list[bool]()
    for written in draws:
        drawn.append(written)
        rewards.append(shaped(written))
        apart += told_apart(rewards[-1], written.samples).tolist()
        if sum(apart) >= wanted:
            break
    places = [place for place, differs in enumerate(apart) if differs][:wanted]
    figures = {
        "prompts_drawn": float(len(apart)),
        "prompts_kept": float(len(places)),
        "filled": len(places) / wanted,
        "informative": sum(apart) / len(apart),
        "drawn_reward": float(torch.cat(rewards).mean()),
        "drawn_tokens": float(sum(int(each.lengths.sum()) for each in drawn)),
    }
    return (chosen(joined(drawn), places, size) if places else drawn[0]), figures


def chosen(written: Written, places: list[int], size: int) -> Written:
    """The prompts at these places with their answers, in micro-batches of `size` prompts, of which the last may be smaller."""
    units = [[unit for some in written.units for unit in some][place] for place in places]
    rows = [place * written.samples + i for place in places for i in range(written.samples)]
    return Written(
        [units[i : i + size] for i in range(0, len(units), size)],
        [written.prompts[row] for row in rows],
        [written.answers[row] for row in rows],
        [written.texts[row] for row in rows],
        {name: score[rows] for name, score in written.scores.items()},
        None if written.gold is None else written.gold[rows],
    )


def joined(some: list[Written]) -> Written:
    """All of them in turn."""
    first = some[0]
    return Written(
        [units for each in some for units in each.units],
        [prompt for each in some for prompt in each.prompts],
        [answer for each in some for answer in each.answers],
        [text for each in some for text in each.texts],
        {name: torch.cat([each.scores[name] for each in some]) for name in first.scores},
        None if first.gold is None else torch.cat([each.gold for each in some if each.gold is not None]),
    )
