"""What is on this machine: the cache, the documentation, the devices."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from posttrain.cli.words import app, end


def _doc_pages(incomplete: str) -> list[str]:
    from posttrain.commands.docs.pages import pages

    return [name for name in pages() if name.startswith(incomplete)]


def _cache_words(incomplete: str) -> list[str]:
    from posttrain.runs.cache_place import KINDS

    return [word for word in ("clean", *KINDS) if word.startswith(incomplete)]


@app.command("cache", rich_help_panel="Before a run")
def cache(
    words: Annotated[
        list[str] | None,
        typer.Argument(metavar="[clean] [KIND...]", help="Which kinds of entries; none: all.", autocompletion=_cache_words),
    ] = None,
    older: Annotated[float | None, typer.Option("--older-than", metavar="DAYS", help="clean: what was not used so long.")] = None,
    everything: Annotated[bool, typer.Option("--all", help="clean: all that the next run makes again by itself.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """What is kept for the next run, and how much room it takes; clean takes away what nobody is using."""

    def command() -> None:
        import json

        from posttrain.commands.cache import CLEAN, clean_cache, list_cache, show_cache, show_cleaned
        from posttrain.errors import UserError

        given = words or []
        if cleans := given[:1] == [CLEAN]:
            found = clean_cache(given[1:], older, everything)
        elif older is not None or everything:
            raise UserError("--older-than and --all say what to clean: posttrain cache clean --older-than 30")
        else:
            found = list_cache(given)
        if as_json:
            print(json.dumps(found, indent=2))
        elif cleans:
            show_cleaned(found)
        else:
            show_cache(found, each=bool(given))

    end(command)


@app.command("docs", rich_help_panel="Before a run")
def documentation(
    page: Annotated[str | None, typer.Argument(help="A page's name, such as first-hour.", autocompletion=_doc_pages)] = None,
    find: Annotated[str | None, typer.Option("--find", metavar="WORDS", help="Where these words stand.")] = None,
    serving: Annotated[bool, typer.Option("--serve", help="All pages in a browser, from this machine alone.")] = False,
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="With --serve; 0: any that is free.")] = 8017,
) -> None:
    """The documentation that came with this version: a list of its pages, or one of them."""

    def command() -> None:
        from posttrain.commands.docs import pages

        if serving:
            from posttrain.commands.docs.server import serve

            serve(port)
        elif find is not None:
            pages.show_found(find)
        elif page is not None:
            pages.show_page(page)
        else:
            pages.show_list()

    end(command)


@app.command(rich_help_panel="Before a run")
def doctor(
    gpu: Annotated[bool, typer.Option("--gpu", help="Try everything that a run uses of the card; on a CPU what it can.")] = False,
    report: Annotated[Path | None, typer.Option("--json", help="With --gpu: a file for the report.")] = None,
) -> None:
    """What this machine has: libraries, device, memory, disk, and whether the hub can be reached."""

    def command() -> None:
        from posttrain.errors import UserError

        if report and not gpu:
            raise UserError("--json: it is the report of --gpu; say posttrain doctor --gpu --json FILE")
        if gpu:
            from posttrain.commands.checks.every import check_device

            check_device(report)
            return
        from posttrain.commands.doctor import examine

        examine()

    end(command)
