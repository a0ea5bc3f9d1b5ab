"""From a gallery to the model that is trained on it, and from that to the files of a result."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator

from posttrain.config.schema import Dreambooth
from posttrain.errors import RunError
from posttrain.models.diffusion.denoiser import save_adapter, save_pipeline, trained_parts
from posttrain.models.diffusion.families import DiffusionModel, text_encoders
from posttrain.models.diffusion.pipelines import pipeline_directory
from posttrain.models.language.packed_lm import count_numbers
from posttrain.models.peft.adalora import RankAllocator
from posttrain.models.peft.export import final_ranks
from posttrain.runs.directory import Run
from posttrain.stages.dreambooth.dataset import DreamboothDataset
from posttrain.stages.manifest import measured
from posttrain.training.loop import seed_step


@dataclass(frozen=True)
class DreamboothModel:
    """The model as it will be trained. trained, total: counts of parameters, of the parts that are trained."""

    module: DiffusionModel
    trained: int
    total: int
    dtype: torch.dtype
    schedule: RankAllocator | None

    def manifest(
        self,
        cfg: Dreambooth,
        gallery: DreamboothDataset,
        kind: str,
        state: dict[str, Any],
        metrics: dict[str, float],
        acc: Accelerator,
    ) -> dict[str, Any]:
        """What manifest.json says of a run, but for what every manifest has."""
        base, inputs = gallery.inputs.base, gallery.inputs
        ranks = final_ranks(self.module.denoiser)
        sources = [{"source": cfg.data.instance_dir, "pictures": len(inputs.instance), "views": len(inputs.views)}]
        if gallery.prior_order:
            origin = cfg.data.class_dir or f"made by the model: {cfg.data.class_prompt}"
            sources += [{"source": origin, "pictures": len({v.path for v in gallery.prior.views}), "views": len(gallery.prior)}]
        for source in sources:
            source |= {"share": 1 / len(sources), "fingerprint": inputs.key}
        return {
            "stage": cfg.stage,
            "parents": inputs.parents,
            "base": {"name": base.name, "path": base.path, "revision": base.revision, "digest": base.digest},
            "weights": {"kind": kind, "path": kind},
            "pipeline": type(gallery.pipe).__name__,
            "token": inputs.token,
            "prompts": {kind: prompt for kind, prompt in gallery.prompts() if kind in ("instance", "class")},
            "size": inputs.framing.side,
            "dtype": str(self.dtype).removeprefix("torch."),
            "quant": cfg.quant.model_dump(),
            "peft": cfg.peft.model_dump() | ({"ranks": ranks} if ranks else {}),
            "trained_parts": sorted(self.module.trained),
            "trainable": {"trained": self.trained, "total": self.total},
            "data": sources,
            "left_out": inputs.left_out,
            "steps": inputs.order.num_steps,
            "images": state["images"],
            **measured(cfg, state, metrics, acc),
        }


def build_dreambooth(cfg: Dreambooth, gallery: DreamboothDataset, num_steps: int) -> DreamboothModel:
    """Put the method on the pipeline's denoiser, and on its text encoders if those are trained; let go of what is done with.

    Raises UserError for targets that match nothing, or ranks that do not fit.
    """
    options = cfg.dreambooth
    seed_step(cfg.train.seed, 0, 0)  # a new adapter's random half is the run's own
    parts = trained_parts(gallery.pipe, cfg.peft, options.text_encoder, num_steps, cfg.train.gradient_checkpointing is True)
    encoded = cfg.data.cache and not options.text_encoder
    if encoded:
        for name in text_encoders(gallery.pipe):
            setattr(gallery.pipe, name, None)
    module = DiffusionModel(gallery.pipe, gallery.captions, gallery.texts if encoded else None, parts)
    denoiser: Any = module.denoiser
    schedule = RankAllocator(denoiser) if cfg.peft.method == "adalora" else None
    return DreamboothModel(module, *count_numbers(module), gallery.dtype, schedule)


def save_dreambooth(
    cfg: Dreambooth, run: Run, built: DreamboothModel, gallery: DreamboothDataset, accelerator: Accelerator
) -> str:
    """Write adapter/ or model/, complete or absent; returns which. Every process must call it."""
    kind = cfg.peft.output
    final, temporary = run.dir / kind, run.dir / f".{kind}.tmp"
    parts = dict(built.module.trained.items())
    try:
        if accelerator.is_main_process:
            shutil.rmtree(temporary, ignore_errors=True)
            if kind == "adapter":
                save_adapter(parts, temporary, cfg.peft.is_additive or cfg.peft.method == "adalora", gallery.inputs.base.path)
            else:
                save_pipeline(pipeline_directory(gallery.inputs.base), parts, temporary)
            shutil.rmtree(final, ignore_errors=True)
            temporary.rename(final)
    except OSError as e:
        raise RunError(f"{final} could not be written: {e}; the last checkpoint is kept, the same command goes on") from None
    accelerator.wait_for_everyone()
    return kind
