"""Files and models that a config names: whether they are there, before the first of several runs trains."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from posttrain.config.stages import typed_config
from posttrain.data.chat.template_text import chat_template
from posttrain.data.selection import SELF, sources_of
from posttrain.data.sources.source import require_source
from posttrain.errors import UserError
from posttrain.runs.identity import flatten
from posttrain.stages.spec import spec_of

_OF_THE_HUB = re.compile(r"[\w.-]*\w(/[\w.-]+)?")  # an id; whether the hub has it is known when it is asked


def require_files(config: dict[str, Any], made: Collection[str] = ()) -> None:
    """Raises UserError, as the run itself would, for what is not there. made: config keys that name what is made before the run
    begins."""
    cfg, flat = typed_config(config), flatten(config)
    spec = spec_of(cfg.stage)
    for key in ("model.name", *(parent.key for parent in spec.parents)):
        if key not in made and flat.get(key):
            _require_model(str(flat[key]), key)
    if spec.reads == "images":
        _require_folder(flat.get("data.instance_dir"), "data.instance_dir")  # others are made, or may be words
        return
    for path, split in _sources(cfg, made):
        require_source(path, split)
    if cfg.model.chat_template and "model.chat_template" not in made:
        chat_template(cfg.model.chat_template)


def _sources(cfg: Any, made: Collection[str]) -> Iterator[tuple[str, str | None]]:
    """Where rows come from, each with its split where one is said."""
    data = cfg.data
    for source in sources_of(data).values():
        if source.path != SELF and not (source is data and "data.path" in made):
            yield source.path, source.split
    others = {"data.eval_path": data.eval_path, "data.decontaminate": data.decontaminate}
    others |= {f"eval.sets.{name}": path for name, path in (cfg.eval.sets or {}).items()}
    yield from ((path, None) for key, path in others.items() if path and path != SELF and key not in made)


def _require_model(name: str, key: str) -> None:
    """A path that no id of the hub looks like has to be a directory; addresses and functions are others' to look at."""
    if "/" in name and ":" not in name and not _OF_THE_HUB.fullmatch(name) and not Path(name).expanduser().is_dir():
        raise UserError(f"{key}: '{name}' is no directory; give one, an id of the hub or a built-in name")


def _require_folder(name: str | None, key: str) -> None:
    if name and not Path(name).expanduser().is_dir():
        raise UserError(f"{key}: {name} does not exist")
