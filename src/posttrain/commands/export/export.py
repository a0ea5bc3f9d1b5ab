"""`posttrain export`: a run's result as others take it. What is written for whom: the folder targets/."""

from __future__ import annotations

import shutil
from pathlib import Path

from posttrain.commands.export.target import TARGETS, Request
from posttrain.commands.merge import refuse_scorer, require_budget, require_empty
from posttrain.console import say
from posttrain.errors import UserError, did_you_mean
from posttrain.runs.artifact import open_artifact
from posttrain.runs.files import by_umask, scratch_beside
from posttrain.runs.remote import here, is_address, result_at


def export_run(run: Path, to: str, out: Path | None, dtype: str | None, max_kl: float) -> Path:
    """Write a run's result for `to` (of TARGETS) into the new directory `out`, beside the run by default; returns it.

    dtype: None: as the target has it. Raises UserError for what cannot be exported, and RunError, with nothing written, where the
    result is further than `max_kl` nats a token from the live model.
    """
    known, to = TARGETS.names(), to.lower()
    if to not in known:
        raise UserError(f"--to: there is no '{to}'{did_you_mean(to, known)} (there are: {', '.join(known)})")
    target = TARGETS.get(to)
    require_budget(max_kl)
    elsewhere, run = is_address(run), Path(here(run, "run"))
    artifact = open_artifact(run, "run")
    artifact.finished()
    if artifact.is_pipeline and not target.pictures:
        raise UserError(
            f"run: {run} is of a diffusion model, which --to {to} does not take; --to comfyui writes its LoRA, and posttrain "
            "merge a whole pipeline"
        )
    if target.pictures and not artifact.is_pipeline:
        raise UserError(f"run: {run} is a {artifact.stage} run, of a language model, and --to {to} is for pictures' models")
    refuse_scorer(artifact)
    dtype = target.dtype_of(dtype)
    beside = Path() if elsewhere else run.resolve().parent
    with result_at(out or beside / f"{run.resolve().name}-{to}") as place:
        require_empty(place)
        with scratch_beside(place) as scratch:
            made = scratch / "made"
            made.mkdir()
            target.write(Request(artifact, made, dtype, max_kl))
            by_umask(made)
            shutil.rmtree(place, ignore_errors=True)
            made.rename(place)
        say(f"exported {out or place}")
    return place
