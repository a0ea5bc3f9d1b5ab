"""Configs that runs of earlier versions have left, made whole: they lack the keys that came later."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import ValidationError

from posttrain.config.files import CHOSEN_BY
from posttrain.config.stages import typed_config
from posttrain.errors import UserError

_MISSING = object()


def completed(config: dict[str, Any]) -> dict[str, Any]:
    """A run's config, as `read_config` gives it, with today's default for each key that it lacks. `config` stays as it is."""
    missing = list(_missing(config))
    if not missing:
        return config
    defaults = _defaults(config)
    for path in missing:
        if (value := _at(defaults, path)) is not _MISSING:
            config = _with(config, path, value)
    return config


def _missing(config: dict[str, Any]) -> Iterator[list[str]]:
    """The keys that the schema wants and the config has not, each as its way down."""
    try:
        typed_config(config)
    except ValidationError as error:
        for complaint in error.errors(include_url=False):
            if complaint["type"] == "missing":
                yield _way(config, [str(part) for part in complaint["loc"]])


def _way(tree: Any, location: list[str]) -> list[str]:
    """Without the tags of unions (a method's name), which are no keys."""
    way = []
    for part in location[:-1]:
        if isinstance(tree, dict) and part in tree:
            way.append(part)
            tree = tree[part]
    return [*way, location[-1]]


def _defaults(config: dict[str, Any]) -> dict[str, Any]:
    """Today's, with the run's own choice of method, quantizer and optimizer where there still is one."""
    from posttrain.config.compose import compose

    chosen = [(group, config.get(group, {}).get(key)) for group, key in CHOSEN_BY.items()]
    try:
        return compose(config["stage"], [f"{group}={name}" for group, name in chosen if name])
    except UserError:
        return compose(config["stage"], [])


def _at(tree: Any, path: list[str]) -> Any:
    for part in path:
        if not isinstance(tree, dict) or part not in tree:
            return _MISSING
        tree = tree[part]
    return tree


def _with(tree: dict[str, Any], path: list[str], value: Any) -> dict[str, Any]:
    first, *rest = path
    return {**tree, first: _with(tree[first], rest, value) if rest else value}
