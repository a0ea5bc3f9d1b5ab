"""manifest.json: what a finished run says of itself. It is written last, so its presence means that the run is complete."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from posttrain.errors import UserError
from posttrain.runs.files import is_inside, sha256

MANIFEST = "manifest.json"
CARD = "README.md"  # a result's model card, for people to change: no part of what `files` lists
SCHEMA = 1  # to be raised when what is written can no longer be read by the code before
Number = int | float


class Record(BaseModel):
    """A part of a manifest. Keys that this version does not know are kept as they are, and written again."""

    model_config = ConfigDict(extra="allow", frozen=True, populate_by_name=True)

    def to_dict(self, *only: str) -> dict[str, Any]:
        """As it stands in the JSON: the keys that it was made with and no others. only: some of them, by the fields' names."""
        return self.model_dump(mode="json", by_alias=True, exclude_unset=True, include=set(only) if only else None)


class Weights(Record):
    """path: of their directory, in the run's."""

    kind: Literal["adapter", "model"]
    path: str


class Base(Record):
    """The model that weights belong to. name: as the user gave it; path: a hub id or an absolute directory, by which it is found
    again; digest: of models/hub.py, None where nobody has read its files. format: of a checkpoint in fewer than 16 bits; held:
    what became of it in memory."""

    name: str
    path: str = ""
    revision: str | None = None
    digest: str | None = None
    format: str | None = None
    held: str | None = None


class TokenizerRecord(Record):
    """hash: of everything that makes tokens; chat_template: of the template's text."""

    hash: str
    chat_template: str | None = None


class TemplateRecord(Record):
    """chat or none, as `data.template`. rows: what has rendered most of the rows; texts: prompts that are texts."""

    rows: Literal["chat", "none"]
    texts: Literal["chat", "none"]


class Parent(Record):
    """A run that this one was made from. role: init, reward, gold or policy; digest: sha256 of its manifest."""

    role: str
    path: str
    digest: str

    @classmethod
    def of(cls, role: str, directory: Path) -> Parent:
        """The finished run in `directory`, by the hash of its manifest."""
        return cls(role=role, path=str(directory), digest=sha256(directory / MANIFEST))


class TrainableCount(Record):
    """Parameters: those that were trained, all, and the trained ones by part. left_in_16_bit: of a quantized base, the share of
    bytes."""

    trained: int
    total: int
    parts: dict[str, int] = Field(default_factory=dict)
    left_in_16_bit: float | None = None


class Method(Record):
    """The config of a method (peft) or of a quantizer (quant), by which it can be built again."""

    method: str = "none"


class PeftRecord(Method):
    """ranks: what AdaLoRA has kept, by layer."""

    ranks: dict[str, int] = Field(default_factory=dict)


class DataRecord(Record):
    """One source: counts of rows and tokens, and the share that it was to have."""

    source: str
    fingerprint: str | None = None
    share: Number | None = None


class Change(Record):
    """What was not as before when the run went on from step `step`."""

    step: int
    change: str


class Alarm(Record):
    """What was said of a policy's figures after step `step`."""

    step: int
    text: str


class Ended(Record):
    """The run ended at step `step`, before its time, with the weights of step `back_to`."""

    step: int
    back_to: int


class BestRecord(Record):
    """The best evaluation by `metric`: its step and value, None where none was a number; waited: evaluations since."""

    metric: str
    step: int | None
    value: Number | None
    waited: int


class TrackerRecord(Record):
    """The run of a tracker, by which it is found there. lost: lines of metrics that it was not told."""

    name: str
    project: str
    id: str | None = None
    lost: int = 0


class CodeState(Record):
    """Of the checkout that made the run; nulls for an installed package."""

    commit: str | None = None
    dirty: bool | None = None


class KernelRecord(Record):
    """choice: as `model.kernels`; what was taken over, and what was not and why, in the keys beside it."""

    choice: Literal["auto", "reference"] = "auto"


class Manifest(Record):
    """What every run says, then what only some stages say."""

    schema_version: int = Field(default=SCHEMA, alias="schema")
    stage: str
    parents: tuple[Parent, ...] = ()
    base: Base = Base(name="")
    weights: Weights
    tokenizer: TokenizerRecord | None = None
    dtype: str = "float32"
    quant: Method = Method()
    peft: PeftRecord = PeftRecord()
    kernels: KernelRecord = KernelRecord()
    data: tuple[DataRecord, ...] = ()
    steps: int = 0
    seconds: Number = 0.0
    metrics: dict[str, Number]
    seed: int | None = None
    device: str = ""
    peak_memory_bytes: int | None = None
    processes: int = 1
    changes: tuple[Change, ...] = ()
    batches_left_out: tuple[dict[str, Any], ...] = ()
    halved: tuple[int, ...] = ()
    ended: Ended | None = None
    best: BestRecord | None = None  # of evaluations, where they were compared
    tracker: TrackerRecord | None = None
    identity: dict[str, Any] = Field(default_factory=dict)  # see StageRun.identity
    made_with: dict[str, str] = Field(default_factory=dict)
    config_digest: str
    code: CodeState = CodeState()
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str]  # name in the run's directory -> sha256

    trainable: TrainableCount | None = None
    template: TemplateRecord | None = None
    chain: str = ""  # what became of init's adapter: stack, merge, continue
    held_out: DataRecord | None = None
    tokens: int | None = None
    images: int | None = None  # in place of tokens where pictures are trained on
    pipeline: str | None = None  # the class of a diffusion pipeline; None: a language model
    token: str | tuple[str | None, ...] | None = None  # the word that stands for the individual, or those of a composed run
    prompts: dict[str, str] = Field(default_factory=dict)  # kind (instance, class) -> prompt
    size: int | None = None  # pixels a side
    trained_parts: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    alarms: tuple[Alarm, ...] = ()
    kl_coef: Number | None = None  # at the end of a policy's run
    sum: tuple[dict[str, Any], ...] = ()  # of a composed run: {run, weight}
    digest: str | None = None  # of the sum

    @field_validator("files", "metrics", mode="before")
    @classmethod
    def _only_what_is_meant(cls, value: Any, info: Any) -> Any:
        """File names lie within the directory; metrics are numbers, of which True is none."""
        for key, each in value.items() if isinstance(value, dict) else ():
            if info.field_name == "files" and not (is_inside(key) and isinstance(each, str)):
                raise ValueError(f"files has {key!r}")
            if info.field_name == "metrics" and not is_number(each):
                raise ValueError(f"metrics.{key} is no number")
        return value

    @model_validator(mode="after")
    def _weights_within(self) -> Self:
        if not is_inside(self.weights.path):
            raise ValueError("weights.kind or weights.path")
        return self

    @property
    def amount(self) -> tuple[int, str]:
        """How much the run trained on, and in what."""
        return (self.images, "images") if self.images is not None else (self.tokens or 0, "tokens")


def is_number(value: Any) -> bool:
    """Is it an int or a float, and no bool?"""
    return isinstance(value, int | float) and not isinstance(value, bool)


def is_finished(directory: Path) -> bool:
    """Is it the directory of a run that has come to its end?"""
    return (directory / MANIFEST).exists()


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a finished run. Raises UserError when there is none or it cannot be read."""
    path = directory / MANIFEST
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{directory} is no finished run (no {MANIFEST})") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is no manifest of a run: it is no object")
    if is_number(found.get("schema")) and found["schema"] > SCHEMA:
        raise UserError(f"{path} is of a later version of posttrain (schema {found['schema']}); update posttrain to read it")
    try:
        return Manifest.model_validate(found)
    except ValidationError as error:
        raise UserError(f"{path} is no manifest of a run: {_first_complaint(error)}") from None


def _first_complaint(error: ValidationError) -> str:
    """What is wrong, in words without pydantic's."""
    complaint = error.errors(include_url=False)[0]
    where, kind, message = complaint["loc"], complaint["type"], complaint["msg"]
    name = ".".join(str(part) for part in where)
    if kind == "value_error":
        return message.removeprefix("Value error, ")
    if where[0] == "weights" and len(where) > 1:
        return "weights.kind or weights.path"
    if kind == "missing":
        return f"{name} is missing"
    expected = {"dict_type": "dict", "model_type": "dict", "tuple_type": "list", "string_type": "str", "int_type": "int"}
    if kind in expected:
        return f"{name} is {type(complaint['input']).__name__}, not {expected[kind]}"
    return f"{name}: {message[0].lower()}{message[1:]}"
