"""A DreamBooth run's LoRA as one file that ComfyUI, and what else knows kohya's names, loads."""

from __future__ import annotations

import torch

from posttrain.commands.export.target import Request, Target
from posttrain.console import say
from posttrain.errors import UserError
from posttrain.models.diffusion.comfy import write_comfy
from posttrain.models.diffusion.denoiser import read_factors

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def _write(request: Request) -> None:
    artifact, manifest = request.artifact, request.artifact.finished()
    if artifact.kind == "model":
        raise UserError(f"run: {artifact.name} has trained a whole pipeline, and ComfyUI's LoRA loader takes LoRAs alone")
    parts = read_factors(artifact.verified().weights, "run")
    assert manifest.pipeline
    rank = str(max(factors.rank for layers in parts.values() for factors in layers.values()))
    metadata = {"ss_network_module": "networks.lora", "ss_network_dim": rank, "ss_network_alpha": rank}
    metadata |= {"ss_output_name": request.name, "modelspec.trigger_phrase": manifest.prompts.get("instance", "")}
    file = request.made / f"{request.name}.safetensors"
    write_comfy(manifest.pipeline, parts, file, DTYPES[request.dtype or "f32"], metadata)
    say(f"to take it into ComfyUI: put {file.name} into its models/loras; its prompt: {manifest.prompts.get('instance', '')}")


TARGET = Target("a LoRA for ComfyUI", tuple(DTYPES), _write, pictures=True)
