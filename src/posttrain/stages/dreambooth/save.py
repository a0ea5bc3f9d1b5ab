"""6. From a trained pipeline to the files of a result, and what the manifest says of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator

from posttrain.console import say
from posttrain.models.diffusion.denoiser import save_adapter, save_pipeline
from posttrain.models.diffusion.pipelines import pipeline_directory
from posttrain.stages.dreambooth.config import Dreambooth
from posttrain.stages.dreambooth.dataset import DreamboothDataset
from posttrain.stages.dreambooth.drift import DRIFT
from posttrain.stages.dreambooth.model import DreamboothModel
from posttrain.stages.result import write_result
from posttrain.stages.steps import Context, Outcome


def save_dreambooth(
    context: Context, dataset: DreamboothDataset, model: DreamboothModel, outcome: Outcome, accelerator: Accelerator
) -> dict[str, Any]:
    """Write adapter/ or model/; what the manifest says of the run. Every process must call it."""
    cfg: Dreambooth = context.cfg
    kind, parts, base = cfg.peft.output, dict(model.module.trained.items()), dataset.inputs.base

    def write(folder: Path, is_writer: bool) -> None:
        if not is_writer:
            return
        if kind == "adapter":
            save_adapter(parts, folder, cfg.peft, base.path)
        else:
            save_pipeline(pipeline_directory(base), parts, folder)

    write_result(context.directory, kind, accelerator, write)
    for name in DRIFT:
        if (percent := outcome.metrics.get(f"drift_{name}/percent")) is not None:
            say(f"drift on {name} images: {percent:+.2f} %")
    return _record(cfg, dataset, model, kind, outcome)


def _record(cfg: Dreambooth, dataset: DreamboothDataset, model: DreamboothModel, kind: str, outcome: Outcome) -> dict[str, Any]:
    base, inputs = dataset.inputs.base, dataset.inputs
    return {
        "stage": cfg.stage,
        "parents": [parent.to_dict() for parent in inputs.parents],
        "base": {"name": base.name, "path": base.path, "revision": base.revision, "digest": base.digest},
        "weights": {"kind": kind, "path": kind},
        "pipeline": type(dataset.pipe).__name__,
        "token": inputs.token,
        "prompts": {kind: prompt for kind, prompt in dataset.prompts() if kind in ("instance", "class")},
        "size": inputs.framing.side,
        "dtype": str(model.dtype).removeprefix("torch."),
        "quant": cfg.quant.model_dump(),
        "peft": cfg.peft.model_dump() | cfg.peft.record(model.module.denoiser),
        "trained_parts": sorted(model.module.trained),
        "trainable": {"trained": model.trained, "total": model.total},
        "data": _sources(cfg, dataset),
        "left_out": inputs.left_out,
        "steps": inputs.order.num_steps,
        "images": outcome.state.seen,
    }


def _sources(cfg: Dreambooth, dataset: DreamboothDataset) -> list[dict[str, Any]]:
    inputs = dataset.inputs
    sources = [{"source": cfg.data.instance_dir, "pictures": len(inputs.instance), "views": len(inputs.views)}]
    if dataset.prior_order:
        origin = cfg.data.class_dir or f"made by the model: {cfg.data.class_prompt}"
        sources += [{"source": origin, "pictures": len({v.path for v in dataset.prior.views}), "views": len(dataset.prior)}]
    return [{**source, "share": 1 / len(sources), "fingerprint": inputs.key} for source in sources]
