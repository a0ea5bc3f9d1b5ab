"""A GGUF file with the Modelfile by which Ollama takes it."""

from __future__ import annotations

from posttrain.commands.export.target import Request, Target
from posttrain.commands.export.targets._gguf_file import KNOWN, gguf_file, instead
from posttrain.commands.export.targets._serving import modelfile
from posttrain.console import say
from posttrain.runs.files import write_text


def _write(request: Request) -> None:
    file, heard = gguf_file(request)
    write_text(request.made / "Modelfile", modelfile(file.name, heard.tokenizer, heard.ends))
    say("to take it into Ollama: ollama create NAME -f Modelfile, in that directory")


TARGET = Target("a GGUF file and a Modelfile", KNOWN, _write, instead=instead)
