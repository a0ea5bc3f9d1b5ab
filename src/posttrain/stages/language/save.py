"""6. From a trained model to the files of a result, and what the manifest says of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from posttrain.config.schema import LanguageStage
from posttrain.data.chat.encoder import template_hash
from posttrain.evaluation.held_out import remember
from posttrain.models.hub import copy_processors, digest, resolve
from posttrain.models.language.architecture import classifier_of, towers
from posttrain.models.language.reward_model import padding_apart
from posttrain.models.language.tokenizer import write_ends
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import sha256, write_json
from posttrain.stages.language.build import TrainableModel
from posttrain.stages.language.checkpoint import use_of_base
from posttrain.stages.language.prepare import PreparedData
from posttrain.stages.result import write_result
from posttrain.stages.steps import Context, Outcome
from posttrain.training.processes import Processes


@dataclass(frozen=True)
class Result:
    """What a run leaves: kind adapter or model, and the digests by which the next stage knows it."""

    kind: str
    base_digest: str
    adapter_digest: str


def save_language(
    context: Context, data: PreparedData, model: TrainableModel, outcome: Outcome, accelerator: Accelerator, scores: bool
) -> dict[str, Any]:
    """Write the result; what the manifest says of it. scores: as a reward model. Every process must call it."""
    cfg: LanguageStage = context.cfg
    if scores:
        padding_apart(data.tokenizer, data.ends)
    result = _write(context, data, model, accelerator, scores)
    if context.main:
        if outcome.measured.rows:
            write_json(context.directory / "held_out.json", outcome.measured.rows)
        function = data.function(cfg, result.base_digest, result.adapter_digest)
        remember(data.sets, outcome.measured.metrics, outcome.measured.rows, function, cache_root())
    record = _record(cfg, data, model, result.kind, outcome)
    return record | ({"classifier": _classifier(model)} if scores else {})


def _write(context: Context, data: PreparedData, model: TrainableModel, accelerator: Accelerator, scores: bool) -> Result:
    """adapter/ or model/ with its tokenizer, and where it writes, with the tokens at which it stops."""
    kind = context.cfg.peft.output
    base = resolve(data.start.source, data.base.revision, weights=False).directory

    def write(folder: Path, is_writer: bool) -> None:
        if kind == "adapter":
            model.module.save_adapter(folder, data.base.path, is_writer)
        else:
            model.module.save(folder, is_writer)
        if is_writer:
            data.tokenizer.save_pretrained(folder)
            if kind == "model":
                copy_processors(base, folder)
            if not scores:
                write_ends(folder, data.ends, base if kind == "adapter" else None)

    final = write_result(context.directory, kind, accelerator, write)

    def named() -> Result:
        if kind == "adapter":
            return Result(kind, data.base.digest, sha256(final / "adapter_model.safetensors"))
        return Result(kind, digest(final), "")

    return Processes.of(accelerator).told(named)


def _classifier(model: TrainableModel) -> str | None:
    """transformers' class that a reward model is saved as; None where the head lies beside the language model."""
    found = classifier_of(model.module.causal.config)
    return None if found is None else type(found).__name__


def _record(cfg: LanguageStage, data: PreparedData, model: TrainableModel, kind: str, outcome: Outcome) -> dict[str, Any]:
    base = data.base
    return {
        "stage": cfg.stage,
        "parents": [parent.to_dict() for parent in data.start.parents],
        "base": {"name": base.name, "path": str(base.path), "revision": base.revision, "digest": base.digest}
        | use_of_base(cfg, base).record(),
        "weights": {"kind": kind, "path": kind},
        "tokenizer": {"hash": data.tokenizer_hash, "chat_template": template_hash(data.tokenizer)},
        "template": data.template.to_dict(),
        "dtype": str(model.dtype).removeprefix("torch."),
        "quant": cfg.quant.model_dump(),
        "peft": cfg.peft.model_dump() | cfg.peft.record(model.module.model),
        "chain": data.start.mode,
        "offload": cfg.train.offload,
        "kernels": model.module.report.record(),
        "reading": model.module.reading.record(),
        "trainable": model.counts,
        "added_tokens": {token.text: token.id for token in data.new_tokens},
        "towers": towers(model.module.causal),
        "data": data.data.record(data.order.until(outcome.steps)),
        "held_out": asdict(data.data.held_out_stats) | cfg.data.model_dump(include={"eval_rows", "eval_share"}),
        "steps": outcome.steps,
        "tokens": outcome.state.seen,
    }
