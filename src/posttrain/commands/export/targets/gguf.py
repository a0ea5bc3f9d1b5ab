"""One GGUF file, for llama.cpp and all that read it."""

from __future__ import annotations

from posttrain.commands.export.target import Request, Target
from posttrain.commands.export.targets._gguf_file import KNOWN, gguf_file, instead


def _write(request: Request) -> None:
    gguf_file(request)


TARGET = Target("one GGUF file", KNOWN, _write, instead=instead)
