"""`posttrain merge`: a run's adapter in the weights of its full-precision base, checked against the live model."""

from __future__ import annotations

import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.table import Table
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from posttrain.commands.sample import merge_pipeline
from posttrain.config.interfaces import Quantizer
from posttrain.console import console, say
from posttrain.errors import RunError, UserError, did_you_mean
from posttrain.evaluation.agreement import Agreement, agreement, held_out_rows, write_logprobs
from posttrain.models.checkpoints.files import Checkpoint
from posttrain.models.checkpoints.formats import Format
from posttrain.models.hub import resolve
from posttrain.models.language.loading import LOADED_AS, load_model
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.tokenizer import write_ends
from posttrain.models.layers import fused_experts
from posttrain.models.peft.merge import Adapter, copy_tokenizer, write_merged
from posttrain.models.quantization import quantizer_of
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.files import by_umask, scratch_beside, write_json
from posttrain.runs.remote import here

FIGURES = "merge.json"
# what --as may be -> how it is written: plain, without a format of the base's checkpoint; same, in it
FORMS = {"plain": "plain", "same": "same", "bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def merge_run(run: Path, out: Path, max_kl: float, onto: str = "auto", form: str = "plain") -> dict[str, Any]:
    """Write a plain model directory to `out`; returns the figures of every candidate, and which was kept.

    On a quantized base two candidates are built, onto the base's own weights (full) and onto the de-quantized ones; the one
    nearer to the live model (KL a token, on held-out rows) is kept, or the one that `onto` names. form: of FORMS. Raises
    UserError for what cannot be merged, and RunError, with nothing written, where it is further away than `max_kl` nats.
    """
    run = Path(here(run, "run"))
    artifact = open_artifact(run, "run").supported()
    if artifact.kind == "model":
        artifact.finished()
    if form not in FORMS:
        raise UserError(f"--as: there is no '{form}'{did_you_mean(form, list(FORMS))} (there are: {', '.join(FORMS)})")
    require_budget(max_kl)
    if artifact.is_pipeline:
        require_empty(out)
        return merge_pipeline(run, out)
    if artifact.kind == "model":
        raise UserError(f"run: {run} is a whole model already, in {artifact.weights}; there is nothing to merge")
    refuse_scorer(artifact)
    require_empty(out)
    adapter = Adapter(artifact.verified().weights, "run")
    adapter.require_mergeable("run", "load it beside its base")
    base_dir = resolve(artifact.source, artifact.base.revision).directory
    _say_form(Checkpoint(base_dir).format, form)
    with scratch_beside(out) as scratch:
        candidates = _build(artifact, adapter, base_dir, scratch, FORMS[form])
        if onto not in ("auto", *candidates):
            raise UserError(f"--onto: there is no '{onto}' here (there are: auto, {', '.join(candidates)})")
        best = min(candidates, key=lambda name: candidates[name].kl) if onto == "auto" else onto
        _show(candidates, best)
        if not candidates[best].kl <= max_kl:
            raise RunError(
                f"the merged model is {candidates[best].kl:.4f} nats a token from the live one, more than --max-kl {max_kl}; "
                f"nothing was written"
            )
        figures = {"run": str(run.resolve()), "kept": best, "max_kl": max_kl}
        figures |= {"candidates": {name: asdict(found) for name, found in candidates.items()}}
        write_json(scratch / best / FIGURES, figures)
        by_umask(scratch / best)
        shutil.rmtree(out, ignore_errors=True)
        (scratch / best).rename(out)
    return figures


def _say_form(found: Format | None, form: str) -> None:
    """Raises UserError for `same` where the base's format cannot be written."""
    if found and form == "same" and not found.is_written:
        raise UserError(f"--as: the base is in {found.name}, which cannot be written here; say --as bf16")
    if found and form != "same":
        back = "; --as same puts it back into that" if found.is_written else ""
        say(f"the base is in {found.name}: the merged model is plain{back}")


def refuse_scorer(artifact: Artifact) -> None:
    """Raises UserError for a reward model: merged as a language model it would lose its head."""
    if artifact.reward_head:
        raise UserError(
            f"run: {artifact.name} is a reward model, and there is no language model to merge; init_reward= takes it as it is, "
            "and docs/rlhf.md says how others load it"
        )


def require_empty(out: Path) -> None:
    """Raises UserError where something lies at `out` that would be overwritten, and where no directory can be made."""
    if out.is_symlink() or (out.exists() and (not out.is_dir() or any(out.iterdir()))):
        raise UserError(f"--out: {out} exists already; give a new directory")
    try:
        with scratch_beside(out):
            pass
    except OSError as error:
        raise UserError(f"--out: {out} cannot be made ({error.strerror})") from None


def require_budget(max_kl: float) -> None:
    """Raises UserError for one that nothing can keep."""
    if not max_kl >= 0:
        raise UserError(f"--max-kl: {max_kl} is no distance; give 0 or more nats a token")


def _build(artifact: Artifact, adapter: Adapter, base_dir: Path, scratch: Path, form: str) -> dict[str, Agreement]:
    """Candidates by name, written under `scratch`, with their agreement with the live model; one model in memory at a time."""
    rows, ends = _live_answers(artifact, adapter, base_dir, scratch, form)
    write_merged(base_dir, adapter, scratch / "full", form=form)
    found: dict[str, Agreement] = {}
    for name in ("full", "dequantized"):
        if (scratch / name).exists():
            copy_tokenizer(artifact.weights, scratch / name)
            write_ends(scratch / name, ends)
            found[name] = _compare(scratch, name, dtype_of(artifact), rows)
    return found


def dtype_of(artifact: Artifact) -> str:
    """In which it was trained; of an adapter of others as it is loaded."""
    return artifact.manifest.dtype if artifact.manifest else LOADED_AS


def _live_answers(
    artifact: Artifact, adapter: Adapter, base_dir: Path, scratch: Path, form: str
) -> tuple[list[Tensor], list[int]]:
    """The rows to compare on, with the live model's log-probs on disk, and where it stops; and the candidate that needs its
    quantized weights."""
    run = Path(artifact.name)
    live = load_model(run)
    rows = held_out_rows(run, live)
    say(f"comparing on {sum(map(len, rows)):,} held-out tokens")
    write_logprobs(live.model, rows, scratch / "live.safetensors")
    if (quantizer := quantizer_of(artifact.quantization)).is_quantized:
        write_merged(base_dir, adapter, scratch / "dequantized", _dequantizer(live.model, quantizer), form)
    return rows, live.ends


def _compare(scratch: Path, name: str, dtype: str, rows: list[Tensor]) -> Agreement:
    model = load_causal(str(scratch / name), None, dtype, "cpu", None, None).eval()
    return agreement(scratch / "live.safetensors", model, rows)


def _dequantizer(model: Any, quantizer: Quantizer) -> Any:
    """A parameter's name in the base -> its weight as the quantized base computes with it; None where it is not quantized."""
    base = model.get_base_model()
    layers = {f"{n.removesuffix('.base_layer')}.weight": m for n, m in base.named_modules() if quantizer.made(m)}
    experts = {full: (module, own) for full, module, own in fused_experts(base) if hasattr(module, "parametrizations")}

    def weight(name: str) -> Tensor | None:
        if name in experts:
            module, own = experts[name]
            return getattr(module, own).detach().cpu()
        if name not in layers:
            return None
        found = quantizer.dequantized(layers[name]).cpu()
        return found.T if issubclass(getattr(layers[name], "source_cls", object), Conv1D) else found

    return weight


def _show(candidates: dict[str, Agreement], best: str) -> None:
    table = Table("onto", "KL a token", "same top", "perplexity: live", "merged", "")
    for name, found in candidates.items():
        figures = (f"{found.kl:.2e}", f"{found.top1:.2%}", f"{found.perplexity_live:.4f}", f"{found.perplexity:.4f}")
        table.add_row(name, *figures, "kept" if name == best else "")
    console.print(table)
    easier = min(candidates, key=lambda name: candidates[name].perplexity)
    if candidates[easier].perplexity < 0.99 * candidates[best].perplexity:
        say(f"perplexity is lower onto {easier}: quantization had cost that much; --onto {easier} keeps it (see --max-kl)")
