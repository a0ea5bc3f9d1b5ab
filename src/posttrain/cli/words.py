"""The command itself, and what its words have in common: settings, files of them, and how a command ends."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from posttrain import __version__
from posttrain.config import completion
from posttrain.launch.exit_codes import guarded

app = typer.Typer(
    name="posttrain",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Post-train a language model: CPT, SFT, RM, PPO, DPO, in full, with LoRA or QLoRA, each stage from the one before.",
    epilog="[bold]Try[/]  posttrain sft model=tiny train.max_steps=5   "
    "[bold]then[/]  posttrain sft +peft=qlora data.path=my.jsonl   [bold]or[/]  posttrain run python_expert",
)
completion.install()


def _overrides(ctx: typer.Context, incomplete: str) -> list[str]:
    return completion.overrides(str(ctx.info_name), incomplete)


Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Settings, in any order.", autocompletion=_overrides)
]
ConfigFile = Annotated[
    list[Path] | None,
    typer.Option("--config", help="A YAML file of settings, or a run's config.yaml; words beat it, and a later file an earlier."),
]
ConfigDir = Annotated[Path | None, typer.Option("--config-dir", help="Your own config groups; they can shadow the shipped ones.")]


def end(command: Callable[[], Any]) -> None:
    """Run it, and end as it does: with its exit code, and a line where it failed."""
    raise typer.Exit(guarded(command))


def words_of(overrides: list[str] | None, config: list[Path] | None) -> list[str]:
    """The settings of a command, with the files of --config among them."""
    return [*(f"--config={file}" for file in config or []), *(overrides or [])]


class StageCommand(TyperCommand):
    """An option that there is not may be a word of another tool."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As the base's, after a look at what the options are called."""
        known = {name for param in self.get_params(ctx) for name in (*param.opts, *param.secondary_opts)}
        for word, after in pairwise([*args, ""]):
            if word.startswith("--") and word.partition("=")[0] not in known and not ctx.resilient_parsing:
                _refuse_option(word, None if after.startswith("-") else after)
        return super().parse_args(ctx, args)


def _refuse_option(word: str, value: str | None) -> None:
    from posttrain.config.other_tools import option_meaning

    if said := option_meaning(word, value):
        raise typer.Exit(guarded(partial(_complain, said)))


def _complain(line: str) -> None:
    from posttrain.errors import UserError

    raise UserError(line)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"posttrain {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")] = False,
) -> None: ...
