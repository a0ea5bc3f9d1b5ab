"""A preview on the terminal and as a page: tokens in the colour of their weight, and what is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.text import Text

from posttrain.commands.preview.preview import Preview, PreviewSegment, Seen, histogram
from posttrain.console import console, say
from posttrain.reports.pages import write_page

TERMINAL_TOKENS = 220  # of one segment; the page has them all
_STYLES = (  # class on the page, style on the terminal, meaning
    ("zero", "bright_black", "does not count"),
    ("less", "cyan", "counts less than 1"),
    ("one", "green", "counts 1"),
    ("more", "magenta", "counts more"),
)


def _kind(weight: float) -> int:
    return 0 if weight == 0 else 1 if weight < 1 else 2 if weight == 1 else 3


def show_preview(preview: Preview, page: Path) -> None:
    """Print the preview and write its page to `page`."""
    for line in preview.lines:
        say(line)
    for seen in preview.sources:
        say(_headline(seen, len(preview.sources) > 1))
        _show_lengths(seen, preview.max_length)
    for note in preview.notes:
        say(note)
    legend = Text("tokens: ")
    for _, style, meaning in _STYLES:
        legend.append(f"{meaning}  ", style=style)
    console.print(legend)
    for number, unit in enumerate(preview.units, 1):
        console.rule(f"{_unit_name(preview)} {number}", style="dim")
        for k, segment in enumerate(unit):
            console.print(_segment_text(segment, k))
    console.rule("findings", style="dim")
    for seen in preview.sources:
        for finding in seen.findings:
            mark = Text("! " if finding.is_mistake else "· ", style="bold red" if finding.is_mistake else "dim")
            console.print(mark + Text(f"{seen.name}: {finding.line}"))
    say("nothing is wrong with these rows" if not preview.mistakes else f"{len(preview.mistakes)} kinds of mistakes")
    say(f"page {page}")


def _unit_name(preview: Preview) -> str:
    return preview.unit


def _headline(seen: Seen, several: bool) -> str:
    stats = seen.stats
    looked = f"all {stats.rows:,} rows" if seen.complete else f"the first {stats.rows:,} rows (--all looks at every one)"
    share = f", {seen.share:.0%} of the run's tokens" if several else ""
    trained = f"{stats.trained_tokens / max(stats.tokens, 1):.1%} trained"
    return f"{seen.name}: {stats.source}, {looked} of shape {stats.shape}, {stats.tokens:,} tokens, {trained}{share}"


def _show_lengths(seen: Seen, max_length: int) -> None:
    bars = histogram(seen.lengths, max_length)
    most = max(count for _, _, count in bars)
    for low, high, count in bars:
        if count:
            bar = "█" * max(1, round(30 * count / most))
            console.print(
                Text(f"  {low:>6,}-{high:<6,}", style="dim") + Text(bar, style="blue") + Text(f" {count:,}", style="dim")
            )


def _segment_text(segment: PreviewSegment, k: int) -> Text:
    """One document or answer; where it begins is a border, over which nothing is seen."""
    row = f" row {segment.row}" if segment.row is not None else ""
    weight = f" weight {segment.weight:g}" if segment.weight != 1 else ""
    text = Text(f"▌{segment.what or k + 1}{row}{weight} ", style="bold yellow")
    for token in segment.tokens[:TERMINAL_TOKENS]:
        text.append(token.text, style=_STYLES[_kind(token.weight)][1])
    if len(segment.tokens) > TERMINAL_TOKENS:
        text.append(f" … {len(segment.tokens) - TERMINAL_TOKENS:,} more tokens", style="dim italic")
    return text


def preview_page(preview: Preview, path: Path) -> Path:
    """Write `path` and return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    mistakes = preview.mistakes
    return write_page(
        path,
        "preview.html",
        title=f"preview of {preview.stage}",
        kicker="preview",
        heading=f"{preview.stage} of {preview.model}",
        state="failed" if mistakes else "done",
        lead=f"{len(mistakes)} kinds of mistakes" if mistakes else "Nothing is wrong with the rows that were looked at.",
        notes=[*preview.lines, *preview.notes],
        sources=[
            {
                "headline": _headline(seen, len(preview.sources) > 1),
                "findings": [(f.is_mistake, f.line) for f in seen.findings],
                "bars": _bars(seen, preview.max_length),
            }
            for seen in preview.sources
        ],
        unit=_unit_name(preview),
        units=[[_marked(segment) for segment in unit] for unit in preview.units],
        legend=[(name, meaning) for name, _, meaning in _STYLES],
    )


def _bars(seen: Seen, max_length: int) -> list[dict[str, Any]]:
    bars = histogram(seen.lengths, max_length)
    most = max(count for _, _, count in bars)
    return [{"label": f"{low:,} to {high:,}", "count": count, "width": round(100 * count / most)} for low, high, count in bars]


def _marked(segment: PreviewSegment) -> dict[str, Any]:
    tokens = [
        {"text": token.text, "kind": _STYLES[_kind(token.weight)][0], "title": f"weight {token.weight:g}"}
        for token in segment.tokens
    ]
    what = segment.what or "document"
    row = f", row {segment.row}" if segment.row is not None else ""
    weight = f", weight {segment.weight:g}" if segment.weight != 1 else ""
    return {"what": f"{what}{row}{weight}, {len(tokens):,} tokens", "tokens": tokens}
