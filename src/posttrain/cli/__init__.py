"""The command line. Typer only: Hydra and torch are imported where they are needed, so that help is there at once."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from posttrain.cli.words import app

__all__ = ["app", "main"]
ABORTED = 130  # click's, of Ctrl-C while it reads the words


def __getattr__(name: str) -> Any:
    """`app`: the commands, made when they are first asked for, since what is installed may add stages, or fail to."""
    if name != "app":
        raise AttributeError(name)
    from posttrain.cli.every import app as found

    return found


def main() -> None:
    """Run the command line. An installed package that is broken, and Ctrl-C at any moment, are told in a line."""
    from posttrain.launch.exit_codes import guarded

    sys.exit(guarded(_run))


def _run() -> None:
    try:
        __getattr__("app")()
    except SystemExit as end:
        if end.code == ABORTED:
            raise KeyboardInterrupt from None
        raise
