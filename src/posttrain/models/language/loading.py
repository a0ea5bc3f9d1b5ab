"""A finished run's result in memory, as others would load it: base, adapter on it, tokenizer."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from posttrain.config.choices import Kernels
from posttrain.data.chat.encoder import Encoder
from posttrain.errors import UserError
from posttrain.models.hub import digest, resolve
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder
from posttrain.models.peft.attach import load_adapter, put_beside
from posttrain.models.quantization import quantization
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.earlier import same_base


@dataclass(frozen=True)
class LoadedModel:
    """model: of transformers, or peft's around it, in evaluation mode."""

    artifact: Artifact
    model: Any
    tokenizer: Any

    @property
    def source(self) -> str:
        """The base's, for its generation config."""
        return self.artifact.source

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens at which it stops, the same that a run saves and that its training counts as an answer's end."""
        return self.encoder.end_tokens()

    @property
    def encoder(self) -> Encoder:
        """What turns rows into its tokens; prompts that are texts are rendered as the run has rendered them."""
        manifest, encoder = self.artifact.manifest, make_encoder(self.tokenizer, self.source, self.artifact.base.revision)
        told = manifest.template if manifest else None
        return encoder.templated(told.texts == "chat" if told else not manifest and encoder.of_chat_model)

    @property
    def kernels(self) -> Kernels:
        """As the run had `model.kernels`."""
        return self.artifact.manifest.kernels.choice if self.artifact.manifest else "auto"


def load_base(artifact: Artifact, device: str, dtype: str, quantized: bool) -> Any:
    """The base that an adapter belongs to. Raises UserError where its weights are not those that the adapter was trained on."""
    base = artifact.base
    source = resolve(artifact.source, base.revision)
    if not same_base(digest(source.directory), base.digest):
        raise UserError(f"base: {base.path} is not what the run was trained on (digests differ); give the run's own base")
    config = quantization(artifact.quantization, device) if quantized else "dequantize"
    return load_causal(base.path, base.revision, dtype, device, False, config, "say")


def load_model(run: Path | str, device: str = "cpu", dtype: str | None = None, quantized: bool = True) -> LoadedModel:
    """Load a run directory's result, whose files are checked first, or a bare model (a directory, a hub id, a built-in name).

    dtype: None, as it was trained; of a bare model bfloat16. quantized: with the base in 4 or 8 bit where it was trained so.
    """
    artifact = open_artifact(run, "run").supported()
    if artifact.is_pipeline:
        raise UserError(f"{run} is of a diffusion model; posttrain sample draws with it, and its page has its figures")
    artifact.verified()
    precision = dtype or (artifact.manifest.dtype if artifact.manifest else "bfloat16")
    tokenizer = load_tokenizer(artifact.tokenizer, None, False, None)
    if artifact.kind == "model":
        model = load_causal(artifact.source, None, precision, device, False, None, "say")
    else:
        model = load_adapter(load_base(artifact, device, precision, quantized), artifact.weights)
    return LoadedModel(artifact, model.eval(), tokenizer)


def scorer(live: LoadedModel) -> PackedScorer:
    """A reward model that reads packs, with the head it was saved with."""
    found = PackedScorer(live.model)
    assert live.artifact.reward_head
    found.load_head(live.artifact.reward_head)
    return found.eval()


def load_models(runs: list[str], device: str) -> tuple[LoadedModel, list[str]]:
    """The first run's result, with the others' adapters beside it on the same base; and their names, by which `switch` chooses.

    Raises UserError for adapters of another base, and for whole models, which have nothing to switch.
    """
    artifacts = [open_artifact(run, "run") for run in runs]
    if rewards := [each.name for each in artifacts if each.reward_head]:
        raise UserError(f"{rewards[0]} is a reward model: it scores, and cannot write; give the run that it was made from")
    live = load_model(runs[0], device)
    names = [Path(run).name for run in runs]
    if len(set(names)) < len(names):
        raise UserError(f"the runs' names are not distinct: {', '.join(names)}")
    for name, other in zip(names[1:], artifacts[1:], strict=True):
        other.finished()
        if "model" in (live.artifact.kind, other.kind) or not same_base(other.base.digest, live.artifact.base.digest):
            raise UserError(f"{other.name} has no adapter on the base of {runs[0]}; give runs of one base, or one run")
        put_beside(live.model, other.verified().weights, name)
    return live, names


def switch(live: LoadedModel, names: list[str], name: str) -> None:
    """Make the adapter called `name` the active one."""
    if live.artifact.kind == "adapter":
        live.model.set_adapter("default" if name == names[0] else name)


def device_here() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
