"""A finished run's result in memory, as others would load it: base, adapter on it, tokenizer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from posttrain.config.choices import Kernels
from posttrain.config.schema import DataConfig
from posttrain.console import say
from posttrain.data.chat.encoder import Encoder
from posttrain.errors import UserError
from posttrain.models.hub import digest, resolve
from posttrain.models.language.architecture import config_of
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.language.run_data import data_of, differences, encoder_of, told_of
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.peft.attach import NEW, load_adapter, put_beside
from posttrain.models.peft.kinds import leaves_the_base
from posttrain.models.quantization import quantization
from posttrain.runs.artifact import Artifact, open_artifact
from posttrain.runs.earlier import same_base

LOADED_AS = "bfloat16"  # a model that no run of ours has made, and whose own config does not say
FORMATS = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class LoadedModel:
    """model: of transformers, or peft's around it, in evaluation mode. words: settings of `data` in place of the run's own.
    beside: the run that a bare model is put beside, and reads rows as."""

    artifact: Artifact
    model: Any
    tokenizer: Any
    words: Mapping[str, str] = field(default_factory=dict[str, str])
    beside: Artifact | None = None

    @property
    def _reads_as(self) -> Artifact:
        return self.artifact if self.artifact.config else self.beside or self.artifact

    @property
    def source(self) -> str:
        """The base's, for its generation config."""
        return self.artifact.source

    @property
    def ends(self) -> list[int]:
        """Ids of the tokens at which it stops, the same that a run saves and that its training counts as an answer's end."""
        return self.encoder.end_tokens()

    @cached_property
    def data(self) -> DataConfig:
        """How rows are read: as the run had `data`, or as `words` say. Raises UserError."""
        return data_of(self._reads_as, self.words)

    @cached_property
    def encoder(self) -> Encoder:
        """What turns rows into its tokens, rendered as the run has rendered them."""
        return encoder_of(self.artifact, self.tokenizer, self.data, told=told_of(self._reads_as, "texts"))

    @property
    def is_chat(self) -> bool:
        """Is it spoken with by its chat template? As the run's rows were rendered, be they texts or messages."""
        asked = self.words.get("data.template", "auto")
        told = asked if asked != "auto" else told_of(self._reads_as, "rows")
        return bool(self.tokenizer.chat_template) and (told == "chat" if told else bool(self.encoder.options.template))

    @property
    def kernels(self) -> Kernels:
        """As the run had `model.kernels`."""
        return self.artifact.manifest.kernels.choice if self.artifact.manifest else "auto"


def load_base(artifact: Artifact, device: str, dtype: str, quantized: bool) -> Any:
    """The base that an adapter belongs to. Raises UserError where its weights are not those that it was trained on; of an adapter
    of others they are known by their name alone, which is said."""
    base = artifact.base
    source = resolve(artifact.source, base.revision)
    if base.digest is None:
        say(f"{artifact.name}: an adapter of others; its base is {base.path}, as it says; whether that has changed is not known")
    elif not same_base(digest(source.directory), base.digest):
        raise UserError(f"base: {base.path} is not what the run was trained on (digests differ); give the run's own base")
    config = quantization(artifact.quantization, device) if quantized else "dequantize"
    return load_causal(base.path, base.revision, dtype, device, None, config, "say")


def of_language(run: Path | str) -> Artifact:
    """Raises UserError for what makes pictures."""
    artifact = open_artifact(run, "run")
    if artifact.is_pipeline:
        raise UserError(f"{run} is of a diffusion model; posttrain sample draws with it, and its page has its figures")
    return artifact


def load_model(
    run: Path | str,
    device: str = "cpu",
    dtype: str | None = None,
    quantized: bool = True,
    words: Mapping[str, str] | None = None,
    scores: bool = False,
) -> LoadedModel:
    """Load a run directory's result, whose files are checked first, or a bare model (a directory, a hub id, a built-in name).

    dtype: None, as it was trained, and a bare model as its files are. quantized: with the base in 4 or 8 bit where it was trained
    so. words: see `LoadedModel`; what does not fit is refused before anything is loaded. scores: it is loaded to be a `scorer`.
    """
    artifact = of_language(run).supported(scores)
    data_of(artifact, words or {})
    bare = artifact.kind == "model" and artifact.manifest is None
    files = resolve(artifact.source, None, field=artifact.field).directory if bare else None
    artifact.verified()
    precision = dtype or (artifact.manifest.dtype if artifact.manifest else _own_format(files) if files else LOADED_AS)
    tokenizer = load_tokenizer(artifact.tokenizer, None, None, None)
    if artifact.kind == "model":
        model = load_causal(artifact.source, None, precision, device, None, None, "say")
    else:
        model = load_adapter(load_base(artifact, device, precision, quantized), artifact.weights)
    return LoadedModel(artifact, model.eval(), tokenizer, words or {})


def _own_format(directory: Path) -> str:
    """Of a model's weights, as its config says."""
    config: Any = config_of(directory, None)
    said = str(getattr(config.get_text_config(), "dtype", None) or config.dtype).removeprefix("torch.")
    return said if said in FORMATS else LOADED_AS


def scorer(live: LoadedModel) -> PackedScorer:
    """A reward model that reads packs, with the head it was saved with."""
    found = PackedScorer(live.model)
    assert live.artifact.reward_head
    found.load_head(live.artifact.reward_head)
    return found.eval()


def load_models(runs: list[str], device: str, words: Mapping[str, str] | None = None) -> tuple[LoadedModel, list[str]]:
    """The first run's result, with the others' adapters beside it on the same base; and their names, by which `switch` chooses.

    words: see `LoadedModel`.

    Raises UserError for adapters of another base, and for whole models, which have nothing to switch.
    """
    artifacts = [open_artifact(run, "run") for run in runs]
    for artifact in artifacts:
        writing(artifact)
    live = load_model(runs[0], device, words=words)
    names = names_of(runs)
    for name, other in zip(names[1:], artifacts[1:], strict=True):
        if not _is_beside(other, live.artifact):
            why = "has to lie on a base of its own; give it alone" if _alone(other, live.artifact) else ""
            raise UserError(
                f"{other.name} {why or f'has no adapter on the base of {runs[0]}; give runs of one base, or one run'}"
            )
        put_beside(live.model, other.verified().weights, _adapter_called(names, name))
        if found := differences(live.artifact, other, live.words):
            say(f"{name}: {', '.join(found)} of its run was another; words are rendered as {names[0]} has them")
    return live, names


def _is_beside(other: Artifact, first: Artifact) -> bool:
    """Are both adapters, of one base, each of which leaves that as it is?"""
    adapters = "model" not in (first.kind, other.supported().kind)
    return adapters and same_base(base_digest(other), base_digest(first)) and not _alone(other, first)


def _alone(*artifacts: Artifact) -> bool:
    """Is one of these adapters of a kind, or with a setting, that others cannot lie beside?"""
    kinds = {artifact.adapter.peft_type for artifact in artifacts if artifact.kind == "adapter"}
    configs = [artifact.adapter.whole for artifact in artifacts if artifact.kind == "adapter"]
    return len(kinds) > 1 or not all(map(leaves_the_base, configs))


def load_in_turn(runs: list[str], device: str, words: Mapping[str, str] | None = None) -> Iterator[tuple[LoadedModel, list[str]]]:
    """As `load_models`, of any models: adapters of one base together, else each alone under its name, the one before being let go
    of first. Raises UserError, before anything is loaded, where one is a reward model."""
    artifacts = [open_artifact(run, "run").supported() for run in runs]
    if len(runs) == 1 or all(_is_beside(other, artifacts[0]) for other in artifacts[1:]):
        yield load_models(runs, device, words)
        return
    for artifact in artifacts:
        writing(artifact)
        data_of(artifact, words or {})
    for name, run in zip(names_of(runs), runs, strict=True):
        yield load_model(run, device, words=words), [name]


def names_of(runs: Sequence[str]) -> list[str]:
    """Of directories their last part, where that tells them apart. Raises UserError for one that is given twice."""
    if len(set(runs)) < len(runs):
        raise UserError(f"{next(run for run in runs if runs.count(run) > 1)} is given twice; give each run once")
    short = [Path(run).name for run in runs]
    return short if len(set(short)) == len(short) else list(runs)


def writing(artifact: Artifact) -> None:
    """Raises UserError for a reward model."""
    if artifact.reward_head:
        raise UserError(f"{artifact.name} is a reward model: it scores, and cannot write; give the run that it was made from")


def base_digest(artifact: Artifact) -> str:
    """Of an adapter's base: as its run has it, of others' adapters that of the weights which are there today."""
    return artifact.base.digest or digest(resolve(artifact.source, artifact.base.revision).directory)


def switch(live: LoadedModel, names: list[str], name: str) -> None:
    """Make the adapter called `name` the active one."""
    if live.artifact.kind == "adapter":
        live.model.set_adapter(_adapter_called(names, name))


def _adapter_called(names: list[str], name: str) -> str:
    """As peft knows it: a name may have dots and slashes, and a module's may not."""
    return NEW if name == names[0] else f"beside_{names.index(name)}"


def device_here() -> str:
    """cuda where there is a GPU, else cpu."""
    return "cuda" if torch.cuda.is_available() else "cpu"
