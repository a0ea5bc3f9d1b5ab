"""Where rows come from, and how sources are mixed."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal, cast

from pydantic import BeforeValidator, Field, model_validator

from posttrain.config.fields import NonNegative, OneOf, Positive, Rate, Share, Strict
from posttrain.config.paths import root
from posttrain.errors import did_you_mean
from posttrain.registry import Registry
from posttrain.runs.yaml_files import read_yaml

DATA_FORMATS: Registry[Any] = Registry(
    "posttrain.data.formats", "posttrain.data_formats", "FORMAT", "data format", of="posttrain.data.formats:Format"
)


@lru_cache
def data_defaults() -> dict[str, Any]:
    """What a source, or a run of an earlier version, leaves unsaid is as configs/data/file.yaml has it."""
    return read_yaml(root("configs") / "data" / "file.yaml")


JOINT = " + "  # between the sources of a list, as one text


def _joined(path: Any) -> Any:
    """A list of sources as one text. Raises ValueError for one that is empty, or that holds what stands alone."""
    if not isinstance(path, list):
        return path
    names = [str(each) for each in cast("list[Any]", path)]
    alone = [name for name in names if name == "self" or name.startswith("builtin:")]
    if alone or not names:
        what = f"{alone[0]} stands alone" if alone else "the list is empty"
        raise ValueError(f"{what}; give files, patterns, directories or hub ids, or mix with data=mix data.sources.NAME.path=...")
    return JOINT.join(names)


ROLES = ("system", "developer", "user", "assistant", "tool")
_WHOSE = ("assistant", "all", "last")


def _whose(given: Any) -> Any:
    """Roles by their names, one alone as a text. Raises ValueError for what is none."""
    roles = cast("list[Any]", given) if isinstance(given, list) else [given]
    known = [*dict.fromkeys((*_WHOSE, *ROLES))] if len(roles) == 1 else [*ROLES]
    if not roles:
        raise ValueError(f"data.train_on: the list names no role; name some of {', '.join(ROLES)}")
    for role in roles:
        if role not in known:
            near = did_you_mean(str(role), known)
            raise ValueError(f"data.train_on: there is no role '{role}'{near} (there are: {', '.join(known)})")
    return roles[0] if roles[0] in _WHOSE and len(roles) == 1 else [role for role in ROLES if role in roles]


Role = Literal["system", "developer", "user", "assistant", "tool"]
TrainOn = Annotated[Literal["assistant", "all", "last"] | list[Role], BeforeValidator(_whose)]
Paths = Annotated[str, BeforeValidator(_joined)]  # a source, or a list of them, which becomes one text


class SourceConfig(Strict):
    """Where rows come from, and which of them are taken."""

    path: Paths  # a file, a list of them, a hub id, builtin:reference|questions|preferences|general, or self: the base writes
    shape: Annotated[str, OneOf(DATA_FORMATS, "auto")]  # the data format; auto: by the columns of the first row
    subset: str | None  # configuration of a hub data set
    split: str
    revision: str | None
    columns: dict[str, str] | None  # a name that a data format knows -> the data's own
    quality: Literal["filter", "weight"] | None  # what the column of that name is for
    quality_top: Annotated[float, Field(gt=0, le=1)]  # share of the rows that a filter keeps, the best
    skip_rows: NonNegative  # of those to train on, before max_rows are taken
    max_rows: Positive | None

    @model_validator(mode="before")
    @classmethod
    def _filled(cls, given: Any) -> Any:
        if not isinstance(given, dict):
            return given
        inherited = {key: value for key, value in data_defaults().items() if key in cls.model_fields and key != "path"}
        return inherited | cast("dict[str, Any]", given)


class MixedSource(SourceConfig):
    """One source of a mixture, with its share of the run's tokens."""

    share: Annotated[float, Field(gt=0, le=1)]  # of the run's tokens


class ReplayConfig(Strict):
    """How the base model writes a general corpus of its own."""

    tokens: Positive
    max_new_tokens: Positive
    temperature: Rate
    batch_size: Positive


class DataConfig(SourceConfig):
    """`data`: what a stage of language models reads, and what of it is held out."""

    path: Paths | None  # pyright: ignore[reportIncompatibleVariableOverride]  # None: with sources
    alpha: Annotated[float, Field(gt=0, le=1)] | Literal["auto"] | None  # share of tokens from `path`; general has the others
    general: SourceConfig
    sources: dict[str, MixedSource] | None  # in place of path, alpha and general
    exhausted: Literal["repeat", "stop"]  # a source whose rows have all been drawn
    replay: ReplayConfig
    eval_path: Paths | None  # None: a share of the rows, chosen by a hash of each row's content
    eval_share: Annotated[float, Field(ge=0, lt=1)]
    eval_rows: NonNegative  # at most so many held-out rows
    eval_rest: Literal["train", "drop"]  # what becomes of rows of the share beyond eval_rows
    dedupe: Literal["none", "exact", "near"]  # which rows that repeat others are left out; those that are held out stay
    decontaminate: Paths | None  # test sets: rows that hold words of theirs are left out
    on_error: Literal["stop", "skip"]  # a row with a mistake in it; skipped ones are counted
    template_kwargs: dict[str, Any] | None  # variables of the chat template; a row's chat_template_kwargs come first
    reasoning: Literal["keep", "drop", "inline"]  # of the assistant: reasoning_content, thinking, or <think> in the content
    tools: Literal["keep", "inline"]  # inline: tools, calls and results as text, for templates that know none
    turns: Literal["all", "each"]  # the examples that a conversation becomes; each: one for each turn of the assistant's
    train_on: TrainOn  # whose words are learnt; last: those of the assistant's last turn
    template: Literal["auto", "chat", "none"]  # of prompts that are texts; auto: chat where the start is a chat model
    long_prompts: Literal["drop", "cut"]  # that leave an answer no room
    on_loss: Literal["own", "stop", "warn"]  # parts of a row that the chat template does not render
    max_untrained_share: Share  # more rows without a trained token than this share is an error

    @model_validator(mode="before")
    @classmethod
    def _last_turn(cls, given: Any) -> Any:
        """turns=last is another name of train_on=last."""
        said = cast("dict[str, Any]", given) if isinstance(given, dict) else {}
        if said.get("turns") != "last":
            return cast("Any", given)
        if (whose := said.get("train_on", "assistant")) not in ("assistant", "last"):
            raise ValueError(f"data.turns: last is data.train_on=last, and data.train_on is {whose}; say one of the two")
        return said | {"turns": "all", "train_on": "last"}

    @model_validator(mode="after")
    def _one_way_to_say_it(self) -> DataConfig:
        if self.sources is None and self.path is None:
            raise ValueError("data.path has no value; give data.path=..., or data=mix with data.sources.NAME.path=...")
        if self.sources is None:
            return self
        if self.alpha is not None:
            raise ValueError("data.alpha: every one of data.sources has a share of its own; leave alpha out")
        if not self.sources:
            raise ValueError("data.sources: there is none; give data.sources.NAME.path=... and data.sources.NAME.share=...")
        total = sum(source.share for source in self.sources.values())
        if abs(total - 1) > 1e-6:
            raise ValueError(f"data.sources: the shares sum to {total:g}; they are shares of all tokens, so make them 1")
        return self
