"""For mlx-lm on a Mac: an adapter beside its base, or a whole model, quantized where that is asked."""

from __future__ import annotations

import torch

from posttrain.commands.export.held import FIGURES, hear
from posttrain.commands.export.plain import OF_MODEL, plain_model
from posttrain.commands.export.target import Request, Target
from posttrain.console import say
from posttrain.models.hub import resolve
from posttrain.models.language.architecture import config_of
from posttrain.models.language.pretrained import load_causal
from posttrain.models.mlx.adapter import write_mlx_adapter
from posttrain.models.mlx.weights import BITS, read_mlx, require_quantizable, write_mlx
from posttrain.models.peft.merge import Adapter
from posttrain.reports.card import hub_name
from posttrain.runs.files import scratch_beside, write_json


def _write(request: Request) -> None:
    """Without --dtype an adapter stays one."""
    artifact, dtype = request.artifact, request.dtype
    source = resolve(artifact.source, artifact.base.revision if artifact.kind == "adapter" else None, weights=False)
    config = config_of(source.directory, None).get_text_config()
    if artifact.kind == "adapter" and dtype is None:
        base = hub_name(artifact.base) or artifact.source
        write_mlx_adapter(Adapter(artifact.verified().weights, "run"), base, config.num_hidden_layers, request.made)
        say("mlx-lm takes the tokenizer and the chat template of the base beside an adapter")
        say(f"to talk with it: mlx_lm.generate --model {base} --adapter-path {request.name}-mlx --prompt 'Hello!'")
    elif dtype in BITS:
        require_quantizable(config)
        _quantized(request, dtype)
    else:
        with scratch_beside(request.made) as scratch:
            plain_model(artifact, scratch / "model", dtype, request.max_kl)
            write_mlx(scratch / "model", request.made, None)


def _quantized(request: Request, dtype: str) -> None:
    """Held against the live run as other files are, by our own reading of it."""
    with scratch_beside(request.made) as scratch:
        heard = hear(request.run, scratch)
        plain_model(request.artifact, scratch / "model", None, request.max_kl)
        if left := write_mlx(scratch / "model", request.made, BITS[dtype]):
            say(f"{len(left)} matrices, such as {left[0]}, stay as they are: their rows do not fill groups")
        back = load_causal(str(scratch / "model"), None, "float32", "cpu", None, None).eval()
        places = dict(back.named_parameters())
        with torch.no_grad():
            for name, value in read_mlx(request.made):
                places[name].copy_(value)
        figures = heard.against(back, dtype, request.max_kl)
    write_json(request.made / FIGURES, {"run": str(request.run.resolve()), **figures})


TARGET = Target("an adapter or a model for mlx-lm", (*OF_MODEL, *BITS), _write)
