"""What a name stands for, wherever one is given: a finished run, a plain adapter, a model, a diffusion pipeline, a hub id.

`open_artifact` is the one place that decides it. It reads small files and loads nothing; who wants to rely on the weights asks
for `verified()` first.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from posttrain.errors import UserError, did_you_mean
from posttrain.runs.directory import CONFIG, read_config
from posttrain.runs.files import PICKLES, sha256
from posttrain.runs.manifest import MANIFEST, Base, Manifest, Parent, is_finished, read_manifest
from posttrain.runs.remote import here

ADAPTER_CONFIG, ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"  # of peft
# of adapter_config.json, what makes no difference to what an adapter does
WITHOUT_EFFECT = {
    "task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode",
    "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "lora_dropout", "megatron_core",
    "qalora_group_size", "runtime_config",
}  # fmt: skip
HEAD_FILE = "score.safetensors"  # of a reward model for which transformers has no class: its head, and the mark that it is one
MODEL_CONFIG, PIPELINE_INDEX = "config.json", "model_index.json"  # of transformers, of diffusers


@dataclass(frozen=True)
class AdapterConfig:
    """What peft's adapter_config.json says. rank: of a LoRA, the largest of any layer; None for what has none."""

    peft_type: str
    use_dora: bool
    rank: int | None
    is_classifier: bool  # it belongs to a model for sequence classification, as a reward model's mostly does
    base: str  # a hub id or a directory
    whole: dict[str, Any]  # the file's content


@dataclass(frozen=True)
class Artifact:
    """A model, or an adapter with the base that it belongs to.

    name, field: as it was given, and where, for messages. directory: None for a name that is no directory (of the hub, or
    built in), of which nothing more is known: it is taken for a model. base: of a model the model itself. tokenizer: what
    `load_tokenizer` takes. quantization: how the base was held, as in a config. manifest: of a finished run, else None.
    """

    name: str
    field: str
    kind: Literal["adapter", "model"]
    directory: Path | None
    base: Base
    tokenizer: str
    quantization: dict[str, Any]
    is_pipeline: bool = False  # of diffusers
    manifest: Manifest | None = None

    @property
    def is_run(self) -> bool:
        """Is it a finished run?"""
        return self.manifest is not None

    @property
    def stage(self) -> str | None:
        """The stage that made it, if a run did."""
        return self.manifest.stage if self.manifest else None

    @property
    def weights(self) -> Path:
        """The directory of its own files. Raises UserError for a name that is no directory."""
        if self.directory is None:
            raise UserError(f"{self.field}: {self.name} is no directory")
        return self.directory / self.manifest.weights.path if self.manifest else self.directory

    @property
    def source(self) -> str:
        """Where the weights to load come from, an adapter's base or the model: a directory, a hub id or a built-in name.

        Raises UserError where that is not known.
        """
        if not self.base.path:
            raise UserError(f"{self.field}: nothing says where the base of the adapter in {self.name} is")
        return self.base.path

    @cached_property
    def config(self) -> dict[str, Any] | None:
        """Of a run, the config that it was started with. Raises UserError where that cannot be read."""
        has_one = self.directory and (self.directory / CONFIG).is_file()
        return read_config(self.directory) if has_one and self.directory else None

    @cached_property
    def adapter(self) -> AdapterConfig:
        """Raises UserError for what is no adapter of peft's, or cannot be read."""
        file = self.weights / ADAPTER_CONFIG
        try:
            found = json.loads(file.read_text(encoding="utf-8"))
            return AdapterConfig(
                peft_type=str(found["peft_type"]),
                use_dora=bool(found.get("use_dora")),
                rank=found.get("r"),
                is_classifier=found.get("task_type") == "SEQ_CLS",
                base=str(found.get("base_model_name_or_path") or ""),
                whole=found,
            )
        except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise UserError(f"{self.field}: {file} cannot be read ({reason}); give a whole adapter") from None

    @cached_property
    def reward_head(self) -> Path | None:
        """The directory whose files have a reward model's head; None where it is no reward model."""
        if self.manifest:
            return self.weights if self.manifest.stage == "rm" else None
        if self.directory is None:
            return None
        of_transformers = self.adapter.is_classifier if self.kind == "adapter" else is_classifier(self.directory)
        return self.directory if of_transformers or (self.directory / HEAD_FILE).is_file() else None

    @cached_property
    def chat_template(self) -> str | None:
        """sha256 of its text, where it is known."""
        if self.manifest:
            return self.manifest.tokenizer.chat_template if self.manifest.tokenizer else None
        file = (self.directory or Path()) / "chat_template.jinja"
        return hashlib.sha256(file.read_bytes()).hexdigest() if self.directory and file.is_file() else None

    @cached_property
    def weight_files(self) -> dict[str, str]:
        """Of a run: name of each file of the weights, in the run's directory -> sha256, as the manifest lists them."""
        if not self.manifest:
            return {}
        prefix = self.manifest.weights.path + "/"
        return {name: value for name, value in self.manifest.files.items() if name.startswith(prefix)}

    @property
    def weight_bytes(self) -> int:
        """Of the safetensors files."""
        return sum(file.stat().st_size for file in self.weights.glob("*.safetensors"))

    @cached_property
    def digest(self) -> str:
        """sha256 of what an adapter adds; '' for a model, whose files have a digest of their own. Of one of others with how its
        tensors are used (alpha, rsLoRA), which nothing holds together with them."""
        if self.kind == "model":
            return ""
        listed = self.manifest and self.weight_files.get(f"{self.manifest.weights.path}/{ADAPTER_WEIGHTS}")
        if listed:
            return listed
        used = {key: value for key, value in self.adapter.whole.items() if key not in WITHOUT_EFFECT and value is not None}
        said = f"{sha256(self.weights / ADAPTER_WEIGHTS)} {json.dumps(used, sort_keys=True)}"
        return hashlib.sha256(said.encode()).hexdigest()

    def parents(self, role: str) -> list[Parent]:
        """For the manifest of what is made from it: one of a run, none of anything else."""
        return [Parent.of(role, self.directory.resolve())] if self.manifest and self.directory else []

    def finished(self) -> Manifest:
        """The manifest. Raises UserError for what is no run."""
        if self.manifest is None:
            raise UserError(f"{self.field}: {self.name} is no finished run (no {MANIFEST})")
        return self.manifest

    def supported(self, scores: bool = False) -> Artifact:
        """Itself. Raises UserError for an adapter of others that names no base, or a directory that is gone, or is a reward
        model's and is not wanted for its scores."""
        if self.kind == "adapter" and not self.is_run:
            if not self.base.path:
                raise UserError(
                    f"{self.field}: {self.weights / ADAPTER_CONFIG} does not say which base the adapter belongs to; write its "
                    "hub id or directory there, as base_model_name_or_path"
                )
            if _can_only_be_a_path(self.base.path) and not Path(self.base.path).expanduser().exists():
                raise UserError(
                    f"{self.field}: the base of {self.name} is {self.base.path} by its {ADAPTER_CONFIG}, and is not there; write "
                    "another directory or a hub id into that file, as base_model_name_or_path"
                )
            if self.reward_head and not scores:
                raise UserError(
                    f"{self.field}: {self.name} is an adapter of a classifier, and no run of posttrain rm; give such a run"
                )
        return self

    def verified(self) -> Artifact:
        """Itself, where a run's files are those of its manifest and no file of an adapter can run code. Reads all of them.

        Raises UserError.
        """
        if self.kind == "model" and not self.is_run:
            return self
        if pickle := next((p for p in sorted(self.weights.rglob("*")) if p.suffix in PICKLES), None):
            raise UserError(f"{self.field}: {pickle} may be a pickle, which can run code; posttrain reads none, remove it")
        if not self.is_run:
            if not (self.weights / ADAPTER_WEIGHTS).is_file():
                raise UserError(f"{self.field}: {self.weights} has no {ADAPTER_WEIGHTS}; save the adapter as safetensors")
            return self
        if not any(name.endswith(".safetensors") for name in self.weight_files):
            raise UserError(
                f"{self.field}: the manifest of {self.directory} lists no safetensors file; give a run made by posttrain"
            )
        for name, expected in self.weight_files.items():
            file = (self.directory or Path()) / name
            if not file.exists():
                raise UserError(f"{self.field}: {file} is missing, though the run's manifest lists it")
            if sha256(file) != expected:
                raise UserError(f"{self.field}: {file} is damaged: its sha256 is not the one in the run's manifest")
        return self


def open_artifact(x: str | Path, field: str) -> Artifact:
    """x: a run's directory, one with an adapter, a model or a pipeline, the address of one (s3://...), a hub id, or a built-in
    name. field: the config key or argument that it stands in.

    Raises UserError for a directory that is none of these, and for a run that is not finished or whose manifest is damaged.
    """
    x = here(x, field)
    name, directory = str(x), Path(x).expanduser()
    if not directory.is_dir():
        if not directory.exists() and _can_only_be_a_path(name):
            raise UserError(f"{field}: {directory} does not exist{_siblings(directory)}")
        cached = _cached_adapter(name)
        return _bare_adapter(name, field, cached) if cached else _plain(name, field, None)
    if is_finished(directory):
        return _run(name, field, directory, read_manifest(directory))
    if (directory / PIPELINE_INDEX).is_file():
        return _plain(name, field, directory, is_pipeline=True)
    if (directory / MODEL_CONFIG).is_file():
        return _plain(name, field, directory)
    if (directory / ADAPTER_CONFIG).is_file():
        return _bare_adapter(name, field, directory)
    begun = (directory / "checkpoints").is_dir() or (directory / CONFIG).is_file()
    hint = " (it has checkpoints: finish it with its own command first)" if (directory / "checkpoints").is_dir() else ""
    hint = hint or ("; finish it with its own command first" if begun else f" (no {MANIFEST}){_siblings(directory)}")
    raise UserError(f"{field}: {directory} is no finished run{hint}")


def _run(name: str, field: str, directory: Path, manifest: Manifest) -> Artifact:
    weights, kind = str(directory / manifest.weights.path), manifest.weights.kind
    base = manifest.base if kind == "adapter" else Base(name=weights, path=weights)
    return Artifact(
        name, field, kind, directory, base, weights, manifest.quant.to_dict(), manifest.pipeline is not None, manifest
    )  # fmt: skip


def _plain(name: str, field: str, directory: Path | None, is_pipeline: bool = False) -> Artifact:
    """A model that nothing was asked of yet: it keeps the name by which it was given."""
    return Artifact(name, field, "model", directory, Base(name=name, path=name), name, {"method": "none"}, is_pipeline)


def _bare_adapter(name: str, field: str, directory: Path) -> Artifact:
    """As peft has saved it; its tokenizer may lie beside it. Which weights its base had is known by their name alone."""
    found = Artifact(name, field, "adapter", directory, Base(name=""), name, {"method": "none"})
    base = found.adapter.base
    tokenizer = str(directory) if (directory / "tokenizer_config.json").is_file() else base
    of_hub = not Path(base).expanduser().exists()  # a directory has no revisions
    revision = found.adapter.whole.get("revision") if of_hub else None
    return replace(found, base=Base(name=base, path=base, revision=revision), tokenizer=tokenizer)


def _cached_adapter(name: str) -> Path | None:
    """The directory of an adapter of the hub that was fetched before; None for all else, of which nothing is asked of the hub."""
    if "/" not in name:
        return None
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, ADAPTER_CONFIG)
    except HFValidationError:
        return None
    return Path(found).parent if isinstance(found, str) else None


def is_classifier(directory: Path) -> bool:
    """Does it hold a model of transformers' classes for sequence classification, which most whole reward models are saved as?"""
    try:
        kinds = json.loads((directory / MODEL_CONFIG).read_text(encoding="utf-8")).get("architectures")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False
    return any(str(kind).endswith("ForSequenceClassification") for kind in kinds or [])


def _can_only_be_a_path(name: str) -> bool:
    """A hub id has one / at most, and begins with a letter or a number."""
    return name[:1] in ("", ".", "/", "~") or name.count("/") > 1


def _siblings(directory: Path) -> str:
    """A near name among the runs beside it."""
    parent = directory.parent
    names = [p.name for p in parent.iterdir() if is_finished(p)] if parent.is_dir() else []
    return did_you_mean(directory.name, names)
