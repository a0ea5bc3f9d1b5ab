"""Hydra's files, parsed once: a command composes several times, a sweep once a job, and parsing YAML is half of that time."""

from __future__ import annotations

import copy
import os
from typing import Any, ClassVar

from hydra._internal.config_repository import ConfigRepository
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import OmegaConf

from posttrain.runs.identity import flatten

Stamp = tuple[Any, ...]


class ParsedFiles(ConfigRepository):
    """Hydra's repository of config files, which parses a file again only where it has changed. What it gives is a copy, for Hydra
    writes into it."""

    _parsed: ClassVar[dict[tuple[str, str], tuple[Stamp, ConfigResult]]] = {}  # of the process: (source, name) -> what it held

    def load_config(self, config_path: str) -> ConfigResult | None:
        source = self._find_object_source(config_path, ObjectType.CONFIG)
        if source is None or source.scheme() == "structured":
            return super().load_config(config_path)
        place, stamp = (repr(source), config_path), _stamp(source, config_path)
        kept = self._parsed.get(place)
        if kept is None or kept[0] != stamp:
            found = super().load_config(config_path)
            assert found is not None
            kept = self._parsed[place] = (stamp, found)
        given = copy.copy(kept[1])
        given.config = copy.deepcopy(kept[1].config)
        return given

    def keys(self, group: str) -> set[str]:
        """Those that the options of a group hold, by their dotted names but for the group's own: {"r", "alpha"} of peft."""
        options = [self.load_config(f"{group}/{option}") for option in self.get_group_options(group)]
        return {key for option in options if option for key in flatten(OmegaConf.to_container(option.config, resolve=False))}

    def __deepcopy__(self, memo: dict[int, Any]) -> ParsedFiles:
        """Hydra takes one each time that it composes, and gives it other sources, but never changes a source."""
        return copy.copy(self)


def _stamp(source: ConfigSource, config_path: str) -> Stamp:
    """What tells whether a file has changed; a file of an installed package does not."""
    if source.scheme() != "file":
        return ()
    found = os.stat(os.path.join(source.path, source._normalize_file_name(config_path)))
    return found.st_mtime_ns, found.st_size, found.st_ino
