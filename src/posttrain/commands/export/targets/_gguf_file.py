"""A GGUF file of a run, held against it, for the targets that want one."""

from __future__ import annotations

from pathlib import Path

from posttrain.commands.export.held import FIGURES, Heard, hear
from posttrain.commands.export.plain import plain_model
from posttrain.commands.export.target import Request
from posttrain.console import say
from posttrain.models.gguf.families import require_family
from posttrain.models.gguf.read import check_vocabulary, load_gguf
from posttrain.models.gguf.spm import read_spm
from posttrain.models.gguf.texts import check_texts, cutter_of
from posttrain.models.gguf.vocabulary import vocabulary_of
from posttrain.models.gguf.write import DTYPES, write_gguf
from posttrain.models.hub import resolve
from posttrain.models.language.architecture import config_of
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.runs.files import scratch_beside, write_json

KNOWN = tuple(DTYPES)


def instead(dtype: str) -> str:
    """What to do for a dtype that is not written here."""
    return "others are made by llama.cpp's llama-quantize, of a file in f16" if dtype.startswith(("q", "iq")) else ""


def gguf_file(request: Request) -> tuple[Path, Heard]:
    """The file, and what the live run says. What can be refused is refused before a weight is loaded."""
    artifact, dtype = request.artifact, request.dtype or "f16"
    source = resolve(artifact.source, artifact.base.revision if artifact.kind == "adapter" else None, weights=False)
    require_family(config_of(source.directory, None))
    tokenizer = load_tokenizer(artifact.tokenizer, None, None, None)
    told = artifact.finished().template
    talks = told is None or told.rows == "chat"
    vocabulary = vocabulary_of(tokenizer, [], len(tokenizer) + 2**20, talks)
    check_texts(cutter_of(vocabulary, tokenizer), tokenizer, vocabulary)
    file = request.made / f"{request.name}-{dtype}.gguf"
    with scratch_beside(request.made) as scratch:
        heard = hear(request.run, scratch)
        plain_model(artifact, scratch / "model", None, request.max_kl)
        config = config_of(scratch / "model", None)
        vocabulary = vocabulary_of(tokenizer, heard.ends, config.vocab_size, talks)
        if left := len(vocabulary.ends) - 1 - len(vocabulary.others):
            say(f"GGUF has room for three stop tokens: {left} of {len(vocabulary.ends)} are left out")
        if vocabulary.beyond:
            say(f"the model has no row for {len(vocabulary.beyond)} tokens, such as {vocabulary.beyond[0]}: left out")
        write_gguf(scratch / "model", config, vocabulary, dtype, file, request.name)
        check_vocabulary(file, vocabulary)
        cutter = read_spm(file) if vocabulary.pieces else cutter_of(vocabulary, tokenizer)
        if told := check_texts(cutter, tokenizer, vocabulary):
            say(told)
        figures = heard.against(load_gguf(file, config), dtype, request.max_kl)
    write_json(request.made / FIGURES, {"run": str(request.run.resolve()), **figures, "ends": vocabulary.ends[:3]})
    return file, heard
