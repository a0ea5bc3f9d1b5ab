"""How a run's words are rendered, for all that reads rows with its result: as its own `data` says, or the user in its place."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from typing import Any, Literal, cast

from pydantic import ValidationError

from posttrain.config.fields import Strict
from posttrain.config.schema import DataConfig, SourceConfig
from posttrain.config.schema.data import data_defaults
from posttrain.config.words import value_of
from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.loss_weights import PLAIN, Weighing
from posttrain.data.chat.options import options_of
from posttrain.data.selection import sources_of
from posttrain.errors import UserError, did_you_mean
from posttrain.models.language.tokenizer import make_encoder
from posttrain.runs.artifact import Artifact

_APART = ("on_loss", "long_prompts", "template")  # of ChatOptions: they change no word, or are compared by what they have done
PREFIX = "data."  # of the settings that say it otherwise
# of one file that is measured: nothing of it is held out, left out, or mixed with others
_WHOLE: dict[str, Any] = {
    "sources": None, "alpha": None, "quality": None, "eval_path": None, "eval_share": 0.0, "skip_rows": 0, "dedupe": "none",
    "decontaminate": None,
}  # fmt: skip


class _Section(Strict):
    data: DataConfig


def data_of(artifact: Artifact, words: Mapping[str, str]) -> DataConfig:
    """`data` as the run had it, of a bare model as a run has it that says nothing; and `words` (`data.template`: `none`) in its
    place. Raises UserError for a word that does not fit."""
    stored: Any = (artifact.config or {}).get("data")
    data: dict[str, Any] = {**data_defaults(), **(stored if isinstance(stored, dict) else {})}
    for key, value in words.items():
        name, *below = key.removeprefix(PREFIX).split(".")
        if name not in DataConfig.model_fields:
            raise UserError(f"unknown key '{key}'{did_you_mean(name, list(DataConfig.model_fields))}")
        data[name] = _set(data.get(name), below, value_of(value, key))
    try:
        return _Section.model_validate({"data": data}).data
    except ValidationError as error:
        from posttrain.config.complaints import first_complaint

        raise UserError(first_complaint(error, {"data": data})) from None


def _set(tree: Any, way: list[str], value: Any) -> Any:
    """`tree` with the value at the end of the way."""
    if not way:
        return value
    below = cast("dict[str, Any]", tree) if isinstance(tree, dict) else {}
    return {**below, way[0]: _set(below.get(way[0]), way[1:], value)}


def of_file(data: DataConfig, path: str, rows: int) -> DataConfig:
    """The first `rows` of one file, read as those were that `data` holds out from: of the same format, under the same names."""
    first = next(iter(sources_of(data).values()))
    same = {name: getattr(first, name) for name in SourceConfig.model_fields}
    return data.model_copy(update={**same, **_WHOLE, "path": path, "max_rows": rows})


def told_of(artifact: Artifact, how: Literal["rows", "texts"]) -> str | None:
    """What has rendered the run's rows, or would have rendered prompts that are texts: chat or none; None for a bare model. A run
    of an earlier version does not say; it knew messages by the template, and texts as they are."""
    if artifact.manifest is None:
        return None
    told = artifact.manifest.template
    return getattr(told, how) if told else {"rows": "chat", "texts": "none"}[how]


def encoder_of(
    artifact: Artifact, tokenizer: Any, data: DataConfig, weighing: Weighing = PLAIN, told: str | None = None
) -> Encoder:
    """What renders rows as the run did. data: of `data_of`; told: of `told_of`, of texts, where it is another run's."""
    how = weighing, options_of(data), told or told_of(artifact, "texts")
    return make_encoder(tokenizer, artifact.source, artifact.base.revision, *how)


def differences(one: Artifact, other: Artifact, words: Mapping[str, str]) -> list[str]:
    """By which settings the words of two runs are rendered otherwise; `words` are said of both."""
    first, second = options_of(data_of(one, words)), options_of(data_of(other, words))
    names = [f.name for f in fields(first) if f.name not in _APART and getattr(first, f.name) != getattr(second, f.name)]
    found = sorted(PREFIX + {"variables": "template_kwargs"}.get(name, name) for name in names)
    same = "data.template" in words or told_of(one, "rows") == told_of(other, "rows")
    return found if same else ["data.template", *found]
