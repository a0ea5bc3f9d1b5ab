"""An adapter that vLLM serves beside its base, or a whole model, and the command."""

from __future__ import annotations

from posttrain.commands.export.plain import copy_result
from posttrain.commands.export.target import Request, Target
from posttrain.commands.export.targets._serving import serve_command
from posttrain.console import say
from posttrain.runs.files import write_text


def _write(request: Request) -> None:
    command, place = serve_command(request.artifact), request.made / request.artifact.kind
    place.mkdir()
    copy_result(request.artifact, place)
    write_text(request.made / "serve.sh", f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\n{command}\n')
    say(f"to serve it: sh serve.sh, in that directory, which does: {command}")


TARGET = Target("the adapter or model, checked for vLLM, and its command", (), _write)
