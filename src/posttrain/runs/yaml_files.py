"""YAML files that somebody else may have written: read without the aliases that make a small file a huge value."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from posttrain.errors import first_line

NODES = 100_000  # of a file with all its aliases written out; a config has some hundred


class Loader(yaml.SafeLoader):
    """yaml.safe_load's, which first counts what the aliases would become."""

    def get_single_node(self) -> Any:
        """As the base's. Raises YAMLError for a value within itself, and for one of more than `NODES` parts."""
        node = super().get_single_node()
        if node is not None and _size(node, {}) > NODES:
            raise yaml.YAMLError(f"its aliases stand for more than {NODES:,} values; write them out")
        return node


def read_yaml(path: Path) -> Any:
    """As yaml.safe_load. Raises YAMLError, OSError or ValueError (no UTF-8) for what cannot be read."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader)


def check_aliases(folder: Path) -> None:
    """Raises YAMLError, with the file, where one below `folder` has aliases that `read_yaml` refuses, or is nested too deep."""
    for file in sorted((*folder.rglob("*.yaml"), *folder.rglob("*.yml"))):
        try:
            Loader(file.read_text(encoding="utf-8")).get_single_node()
        except (OSError, ValueError, yaml.MarkedYAMLError):  # who reads it says so
            continue
        except RecursionError:
            raise yaml.YAMLError(f"{file}: it is nested too deep") from None
        except yaml.YAMLError as error:
            raise yaml.YAMLError(f"{file}: {first_line(error)}") from None


def _size(node: yaml.Node, known: dict[int, int]) -> int:
    """Parts of a node, aliases written out. known: sizes by the node's id; 0 while it is being counted."""
    if id(node) in known:
        if known[id(node)] == 0:
            raise yaml.YAMLError("it has a value within itself")
        return known[id(node)]
    known[id(node)] = 0
    parts: list[Any] = []
    if isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    elif isinstance(node, yaml.SequenceNode):
        parts = list(node.value)
    known[id(node)] = 1 + sum(_size(part, known) for part in parts)
    return known[id(node)]
