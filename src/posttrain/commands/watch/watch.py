"""`posttrain watch`: all runs of a folder in the browser, live."""

from __future__ import annotations

import errno
from pathlib import Path

from posttrain.commands.watch.folder import Folder
from posttrain.commands.watch.server import Server
from posttrain.console import say
from posttrain.errors import Stopped, UserError
from posttrain.training.signals import leaving_at_once


def watch(folder: Path, port: int) -> None:
    """Serve the pages of a folder until a signal. Raises UserError where it cannot, Stopped at its end."""
    root = folder.expanduser().resolve()
    if not root.is_dir():
        raise UserError(f"{folder}: there is no such folder; give the one that your runs are in")
    try:
        server = Server(Folder(root), port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UserError(f"--port: {port} is taken; give another, or 0 for any that is free") from None
        raise UserError(f"--port: {port}: {error.strerror or error}; give another") from None
    try:
        with server, leaving_at_once():
            say(f"{len(server.folder.runs())} runs of {root} at {server.address} (for this machine only; Ctrl-C ends)")
            server.serve_forever(poll_interval=0.2)
    except Stopped:
        raise Stopped("the pages are no longer served; runs go on as they are") from None
