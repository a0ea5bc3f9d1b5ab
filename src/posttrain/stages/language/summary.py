"""What is about to happen, in the user's words: model, data, and what became of its rows. A run and its preview say the same."""

from __future__ import annotations

from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.schema import LanguageStage
from posttrain.data.collate import BatchSampler
from posttrain.data.mixture import Mixture, seen
from posttrain.data.prepare import PreparedSource
from posttrain.data.stats import SourceStats, place_of
from posttrain.models.hub import BaseInfo
from posttrain.stages.language.checkpoint import use_of_base
from posttrain.stages.language.init import InitSource

EXAMPLE = 200  # letters of the first row that are shown; of each of several sources half as many
OFFLOADED: dict[str, list[str]] = {  # by `train.offload`
    "none": [],
    "activations": ["activations wait for the backward in the CPU's memory (train.offload=activations)"],
    "layers": ["the base's layers are not in memory but for the one that computes (train.offload=layers)"],
}
HOW = {"stack": "a new one on top", "continue": "trained on", "merge": "merged into it"}


def lines_of(
    cfg: LanguageStage, directory: Path, start: InitSource, base: BaseInfo, data: Mixture, order: BatchSampler, tokenizer: Any
) -> list[str]:
    """Said before anything heavy is loaded."""
    lines = [*lines_of_start(cfg, start, base), *lines_of_data(cfg, data, tokenizer)]
    if len(data.parts) > 1:
        lines += _of_shares(data, order)
    units = "prompts" if data.stats.trained_tokens == 0 else "sequences"
    return [*lines, f"{order.num_steps} steps of {order.units_per_step} {units} -> {directory}"]


def lines_of_start(cfg: LanguageStage, start: InitSource, base: BaseInfo) -> list[str]:
    """The model, and what becomes of an adapter on it, and of its checkpoint's format."""
    line = f"model {base.name}"
    if start.mode:
        line += f" with the adapter of {cfg.init}, {HOW[start.mode]} (chain.mode={start.mode})"
    return [line, *use_of_base(cfg, base).lines(), *OFFLOADED[cfg.train.offload]]


def lines_of_data(cfg: LanguageStage, data: Mixture, tokenizer: Any, complete: bool = True) -> list[str]:
    """Of each source what became of its rows, and the first of them as the model sees it. complete: these are all rows."""
    letters = EXAMPLE if len(data.parts) == 1 else EXAMPLE // 2
    lines: list[str] = []
    for part in data.parts:
        held_out, *warnings = _of_held_out(cfg, part, complete) if part is data.parts[0] else [""]
        reward: Any = getattr(cfg, "reward", None)
        how = cfg.data.dedupe != "none", cfg.data.on_error == "skip", bool(reward and reward.function)
        lines += lines_of_source(part.stats, cfg.example_length, "train.", held_out, *how) + warnings
        lines += example_of(part, tokenizer, letters)
    return lines


def _of_held_out(cfg: LanguageStage, part: PreparedSource, complete: bool) -> list[str]:
    """How many rows are held out, and a warning where none is of those that were to be."""
    rows, most = part.held_out_stats.rows, cfg.data.eval_rows
    share = f"data.eval_share={cfg.data.eval_share}"
    apart = part.stats.source.startswith("builtin:") or not (cfg.data.eval_path or cfg.data.eval_share)
    if rows >= most or apart or not complete:
        return [f"; {rows} rows held out"]
    said = [f"; {rows} rows held out, of at most {most} ({'data.eval_path' if cfg.data.eval_path else share})"]
    why = f"of these rows, chosen by their content, none is in {share}; a larger share, or data.eval_path"
    return said if rows else [*said, f"  warning: no row is held out, so the run is not measured on its own data: {why}"]


def lines_of_source(
    stats: SourceStats, max_length: int, section: str = "", held_out: str = "", dedupes: bool = False, skips: bool = True,
    keeps: bool = False,
) -> list[str]:  # fmt: skip
    """What became of the rows of a source.

    Args:
        section: of the config, in which `max_length` is.
        held_out: what is said of held-out rows.
        dedupes: rows that stand elsewhere are left out.
        skips: rows with a mistake are; else a preview has gone on where a run would not.
        keeps: columns are kept for reward functions, which may ask for them.
    """
    samples = stats.trained_tokens == 0  # the rows are prompts, the stage writes what it trains on
    counted = "" if samples else f", {stats.tokens:,} tokens, {stats.trained_tokens:,} trained"
    lines = [f"data {stats.source}: {stats.rows:,} rows of shape {stats.shape}{counted}{held_out}"]
    limit = f"{section}max_length={max_length}"
    skipped = "rows skipped" if skips else "rows with a mistake, at which the run stops (data.on_error)"
    for count, what in (
        (stats.filtered, "rows left out, of less quality"),
        (stats.disliked, "rows left out, whose label is false"),
        (stats.held_again, "rows left out, they repeat a held-out row"),
        (stats.held_beyond, "rows left out, beyond data.eval_rows (data.eval_rest=drop)"),
        (stats.skipped, f"{skipped}, the first: {(stats.places.get('skipped') or [''])[0]}"),
        (stats.no_room, f"rows left out, their prompts leave no room in {max_length} tokens (data.long_prompts=cut cuts them)"),
        (stats.untrained - stats.no_room, "rows left out, no token of theirs would count"),
        (stats.truncated, f"rows cut to {limit}"),
        (stats.cut_prompts, f"prompts cut at their beginning, to leave an answer room in {max_length} tokens"),
        (stats.alike, f"pairs left out, whose answers are equal when cut to {limit}"),
        (stats.endless, f"pairs left out, whose end of turn is cut off by {limit}"),
        (stats.border_tokens, "tokens lie across a prompt's border and count as the answer's"),
    ):
        if count:
            lines.append(f"  {count:,} {what}")
    lines += _of_overlaps(stats, dedupes)
    for part, count in stats.lost.items():
        lines.append(f"  {part}: not rendered by the chat template in {count:,} rows, the first: {stats.places[part][0]}")
    if stats.unused:
        lines.append(f"  columns {'kept for the reward functions' if keeps else 'not used'}: {', '.join(stats.unused)}")
    return lines


def example_of(part: PreparedSource, tokenizer: Any, letters: int) -> list[str]:
    """The first row as the model sees it: of a pair with the chosen answer, of a prompt without the known one."""
    train, shown = part.train, ""
    if len(train.rows):
        first = int(np.argmin(train.rows))  # packed documents lie in another order
        stop = int(train.splits[first, int(part.stats.trained_tokens > 0)]) if len(train.splits) else None
        found, counts = train.sequence(first)
        pairs = zip(found[:stop].tolist(), counts[:stop].tolist(), strict=True)
        for trained, run in groupby(pairs, key=lambda token: bool(token[1])):
            text = tokenizer.decode([token for token, _ in run])
            shown += f"[[{text}]]" if trained else text
    shown = shown if len(shown) <= letters else shown[:letters] + "..."
    return [f"  the first row, [[trained]]: {shown}".replace("\n", "\\n")] if shown else []


def lines_of_template(template: str, before: str | None, field: str) -> list[str]:
    """What to say where rows are rendered otherwise than those of the run that `field` names."""
    if before is None or template == before:
        return []
    how = {"chat": "by the chat template", "none": "as plain text"}
    said = f"the rows are rendered {how[template]}, those of {field} {how.get(before, before)}"
    return [f"  warning: {said}; data.template={before} renders prompts that are texts as {field} has them"]


def _of_overlaps(stats: SourceStats, out: bool) -> list[str]:
    """Rows that stand elsewhere too. out: they are left out."""
    ways = [
        ("repeated", stats.repeated, "repeat an earlier one"),
        ("also_held", stats.also_held, "are held out as well, which flatters what is measured on them"),
        ("near", stats.near, "are nearly an earlier or a held-out one"),
        *((place_of(name), count, f"are in {name} as well") for name, count in stats.shared.items()),
        *((place_of(name, near=True), count, f"are nearly one of {name}") for name, count in stats.shared_near.items()),
    ]
    begin, hint = ("left out, they ", "") if out else ("", "; data.dedupe=exact leaves them out")
    lines = [f"  {n:,} rows {begin}{why}, the first: {stats.places[what][0]}{hint}" for what, n, why in ways if n]
    for name, count in stats.known.items():
        lines.append(f"  {count:,} rows left out, they hold words of {name}, the first: {stats.places[name][0]}")
    return lines


def _of_shares(data: Mixture, order: BatchSampler) -> list[str]:
    """Asked and given shares, and how often each source is gone through."""
    lines: list[str] = []
    for part, share, figures in zip(data.parts, data.shares, seen(order.drawn, data.sizes), strict=True):
        passes = f"{figures['passes']:.2f} passes over its rows"
        repeated = f", each repeated {figures['passes']:.1f} times" if figures["passes"] > 1 else ""
        lines.append(f"  {part.name}: {share:.1%} of the tokens asked, {figures['share_seen']:.1%} given, {passes}{repeated}")
    return lines
