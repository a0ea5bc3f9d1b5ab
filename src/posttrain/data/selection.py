"""Which sources a data config is made of."""

from __future__ import annotations

from typing import Any

from posttrain.config.schema import DataConfig, SourceConfig

SELF = "self"  # a path: the base model writes the rows


def sources_of(data: DataConfig) -> dict[str, SourceConfig]:
    """The sources by name, the one that is held out from and measured first."""
    if data.sources:
        return dict(data.sources)
    if data.alpha is None or data.alpha == 1:
        return {"data": data}
    return {"domain": data, "general": data.general}


def replays(data: DataConfig) -> bool:
    """Does the base model write one of the sources?"""
    return any(source.path == SELF for source in sources_of(data).values())


def replayed(data: DataConfig, path: str) -> DataConfig:
    """With the base model's texts at `path`."""

    def at(source: Any) -> Any:
        return source.model_copy(update={"path": path}) if source.path == SELF else source

    sources = {name: at(source) for name, source in data.sources.items()} if data.sources else None
    return data.model_copy(update={"general": at(data.general), "sources": sources})


def at_most(data: DataConfig, rows: int) -> DataConfig:
    """With no more rows of each source."""

    def few(source: Any) -> Any:
        return source.model_copy(update={"max_rows": min(rows, source.max_rows or rows)})

    sources = {name: few(source) for name, source in data.sources.items()} if data.sources else None
    return few(data).model_copy(update={"general": few(data.general), "sources": sources})
