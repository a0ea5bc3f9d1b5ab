"""`posttrain export`: a run's result as others take it: a model directory, a GGUF file, for Ollama, for vLLM."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.commands.export_targets import modelfile, serve_command
from posttrain.commands.merge import merge_run, refuse_scorer, require_empty
from posttrain.console import say
from posttrain.errors import RunError, UserError, did_you_mean
from posttrain.evaluation.agreement import Agreement, agreement, held_out_rows, write_logprobs
from posttrain.models.gguf.read import check_vocabulary, load_gguf
from posttrain.models.gguf.vocabulary import vocabulary_of
from posttrain.models.gguf.write import DTYPES, require_dtype, require_family, write_gguf
from posttrain.models.hub import resolve
from posttrain.models.language.architecture import config_of
from posttrain.models.language.loading import LoadedModel, load_model
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.files import by_umask, copy_own, scratch_beside, write_json, write_text
from posttrain.runs.manifest import CARD

FIGURES = "export.json"
PROMPT, PROMPTS, ANSWER = 16, 4, 24  # tokens of a prompt, prompts, tokens of a greedy answer
OF_MODEL = {"bf16": "bf16", "f16": "fp16", "f32": "fp32"}  # --dtype -> merge's --as


def export_run(run: Path, to: str, out: Path | None, dtype: str | None, max_kl: float) -> Path:
    """Write a run's result for `to` (hf, gguf, ollama, vllm) into the new directory `out`, beside the run by default; returns it.

    dtype: None: for hf as the base has it, for gguf and ollama f16. Raises UserError for what cannot be exported, and RunError,
    with nothing written, where the result is further than `max_kl` nats a token from the live model.
    """
    if to not in TARGETS:
        raise UserError(f"--to: there is no '{to}'{did_you_mean(to, list(TARGETS))} (there are: {', '.join(TARGETS)})")
    artifact = open_artifact(run, "run")
    artifact.finished()
    if artifact.is_pipeline:
        raise UserError(f"run: {run} is of a diffusion model; posttrain merge writes a whole pipeline of it")
    refuse_scorer(artifact)
    place = out or run.with_name(f"{run.resolve().name}-{to}")
    require_empty(place)
    target = TARGETS[to]
    if dtype is not None:
        require_dtype(dtype, target.dtypes)
    with scratch_beside(place) as scratch:
        made = scratch / "made"
        made.mkdir()
        target.write(artifact, made, dtype, max_kl)
        by_umask(made)
        shutil.rmtree(place, ignore_errors=True)
        made.rename(place)
    say(f"exported {place}")
    return place


def _hf(artifact: Artifact, made: Path, dtype: str | None, max_kl: float) -> None:
    _plain_model(artifact, made, dtype, max_kl)


def _plain_model(artifact: Artifact, made: Path, dtype: str | None, max_kl: float) -> None:
    """A model directory: merged, or a copy of what is a whole model already."""
    if artifact.kind == "adapter":
        merge_run(Path(artifact.name), made, max_kl, form=OF_MODEL[dtype] if dtype else "plain")
        return
    if dtype is not None:
        raise UserError(f"--dtype: {artifact.name} is a whole model, which hf takes as it is; leave it out")
    _copy(artifact, made)


def _copy(artifact: Artifact, made: Path) -> None:
    """The result's files that the manifest lists."""
    listed = {Path(name).name for name in artifact.weight_files}
    weights = artifact.verified().weights
    if left := copy_own((file for file in weights.iterdir() if file.is_file()), weights, made, listed | {CARD}):
        say(f"{weights}: {', '.join(left)} left out: links to elsewhere, or files that its manifest does not list")


def _gguf(artifact: Artifact, made: Path, dtype: str | None, max_kl: float) -> None:
    _write_gguf(artifact, made, dtype or "f16", max_kl)


def _ollama(artifact: Artifact, made: Path, dtype: str | None, max_kl: float) -> None:
    live, file = _write_gguf(artifact, made, dtype or "f16", max_kl)
    write_text(made / "Modelfile", modelfile(file.name, live.tokenizer, live.ends))
    say("to take it into Ollama: ollama create NAME -f Modelfile, in that directory")


def _vllm(artifact: Artifact, made: Path, dtype: str | None, max_kl: float) -> None:
    command = serve_command(artifact)
    (made / artifact.kind).mkdir()
    _copy(artifact, made / artifact.kind)
    write_text(made / "serve.sh", f'#!/bin/sh\ncd "$(dirname "$0")" || exit 1\n{command}\n')
    say(f"to serve it: sh serve.sh, in that directory, which does: {command}")


@dataclass(frozen=True)
class Target:
    """dtypes: what --dtype may be. write: the result into a directory."""

    dtypes: tuple[str, ...]
    write: Callable[[Artifact, Path, str | None, float], Any]


TARGETS = {
    "hf": Target(tuple(OF_MODEL), _hf),
    "gguf": Target(tuple(DTYPES), _gguf),
    "ollama": Target(tuple(DTYPES), _ollama),
    "vllm": Target(("auto",), _vllm),
}


def _write_gguf(artifact: Artifact, made: Path, dtype: str, max_kl: float) -> tuple[LoadedModel, Path]:
    """The file, held against the live run. What can be refused is refused before a weight is loaded."""
    source = resolve(artifact.source, artifact.base.revision if artifact.kind == "adapter" else None, weights=False)
    require_family(config_of(source.directory, None))
    tokenizer = load_tokenizer(artifact.tokenizer, None, None, None)
    vocabulary_of(tokenizer, [], len(tokenizer) + 2**20)
    name = (artifact.directory or Path("model")).resolve().name
    file = made / f"{name}-{dtype}.gguf"
    with scratch_beside(made) as scratch:
        live = load_model(artifact.name)
        rows = held_out_rows(Path(artifact.name), live)
        write_logprobs(live.model, rows, scratch / "live.safetensors")
        answers = _greedy(live.model, rows, live.ends)
        live = LoadedModel(live.artifact, None, live.tokenizer)  # one model in memory at a time
        (scratch / "model").mkdir()
        _plain_model(artifact, scratch / "model", None, max_kl)
        config = config_of(scratch / "model", None)
        vocabulary = vocabulary_of(tokenizer, live.ends, config.vocab_size)
        if len(vocabulary.ends) > 2:
            say(f"GGUF has room for two stop tokens: {len(vocabulary.ends) - 2} of {len(vocabulary.ends)} are left out")
        write_gguf(scratch / "model", config, vocabulary, dtype, file, name)
        check_vocabulary(file, vocabulary)
        back = load_gguf(file, config)
        found = agreement(scratch / "live.safetensors", back, rows)
        same = sum(a == b for a, b in zip(answers, _greedy(back, rows, live.ends), strict=True))
    _judge(found, same, len(answers), max_kl, dtype)
    figures = asdict(found) | {"greedy_same": same, "greedy": len(answers), "max_kl": max_kl, "dtype": dtype}
    write_json(made / FIGURES, {"run": str(Path(artifact.name).resolve()), **figures, "ends": vocabulary.ends[:2]})
    return live, file


def _judge(found: Agreement, same: int, count: int, max_kl: float, dtype: str) -> None:
    """Raises RunError above the budget."""
    say(
        f"read back: {found.kl:.2e} nats a token from the live model, same top token {found.top1:.2%}, "
        f"{same} of {count} greedy answers the same word for word"
    )
    if not found.kl <= max_kl:
        raise RunError(
            f"the file in {dtype} is {found.kl:.4f} nats a token from the live model, more than --max-kl {max_kl}; nothing was "
            "written (a --dtype of more bits is nearer)"
        )


@torch.no_grad()
def _greedy(model: Any, rows: list[Tensor], ends: list[int]) -> list[list[int]]:
    """The likeliest tokens after the beginnings of rows, to a stop token or ANSWER."""
    answers = []
    for row in rows[:PROMPTS]:
        prompt, answer = row[:PROMPT].to(model.device), []
        while len(answer) < ANSWER and (not answer or answer[-1] not in ends):
            ids = torch.cat([prompt, prompt.new_tensor(answer)])[None]
            answer.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        answers.append(answer)
    return answers
