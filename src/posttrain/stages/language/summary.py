"""What is about to happen, in the user's words: model, data, and what became of its rows."""

from __future__ import annotations

from pathlib import Path

from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.data.mixture import seen
from posttrain.data.stats import SourceStats
from posttrain.stages.language.build import PreparedData


def announce(cfg: LanguageStage, directory: Path, inputs: PreparedData) -> None:
    """Lines before anything heavy is loaded."""
    if inputs.start.mode:
        how = {"stack": "a new one on top", "continue": "trained on", "merge": "merged into it"}[inputs.start.mode]
        say(f"model {inputs.base.name} with the adapter of {cfg.init}, {how} (chain.mode={inputs.start.mode})")
    else:
        say(f"model {inputs.base.name}")
    for part in inputs.data.parts:
        held_out = f"; {part.held_out_stats.rows} rows held out" if part is inputs.data.parts[0] else ""
        _say_of_source(cfg, part.stats, held_out)
    if len(inputs.data.parts) > 1:
        _say_of_shares(inputs)
    order = inputs.order
    units = "prompts" if inputs.data.stats.trained_tokens == 0 else "sequences"
    say(f"{order.num_steps} steps of {order.units_per_step} {units} -> {directory}")


def _say_of_source(cfg: LanguageStage, stats: SourceStats, held_out: str) -> None:
    samples = stats.trained_tokens == 0  # the rows are prompts, the stage writes what it trains on
    counted = "" if samples else f", {stats.tokens:,} tokens, {stats.trained_tokens:,} trained"
    say(f"data {stats.source}: {stats.rows:,} rows of shape {stats.shape}{counted}{held_out}")
    too_long = f"rows left out, their prompts are longer than {cfg.example_length} tokens"
    for count, what in (
        (stats.filtered, "rows left out, of less quality"),
        (stats.skipped, f"rows skipped, the first: {(stats.places.get('skipped') or [''])[0]}"),
        (stats.untrained, too_long if samples else "rows left out, no token of theirs would count"),
        (stats.truncated, f"rows cut to train.max_length={cfg.train.max_length}"),
        (stats.border_tokens, "tokens lie across a prompt's border and do not count"),
    ):
        if count:
            say(f"  {count:,} {what}")


def _say_of_shares(inputs: PreparedData) -> None:
    """Asked and given shares, and how often each source is gone through."""
    found = seen(inputs.order.drawn, inputs.data.sizes)
    for part, share, figures in zip(inputs.data.parts, inputs.data.shares, found, strict=True):
        passes = f"{figures['passes']:.2f} passes over its rows"
        repeated = f", each repeated {figures['passes']:.1f} times" if figures["passes"] > 1 else ""
        say(f"  {part.name}: {share:.1%} of the tokens asked, {figures['share_seen']:.1%} given, {passes}{repeated}")
