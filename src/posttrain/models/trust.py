"""Code that lies beside a model: run for the one content that the user has pinned, and for nothing else."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import constants

from posttrain.config.schema.model import LanguageModel
from posttrain.errors import UserError
from posttrain.runs.files import code_digest


def pin_of(model: LanguageModel) -> str | None:
    """The commit or digest of the code that may be run; None: none may."""
    return model.revision if model.trust_remote_code else None


def may_run_code(directory: Path, pin: str | None) -> bool:
    """What to hand to transformers as trust_remote_code. False where there is no code to run.

    pin: of `pin_of`: a commit, for a snapshot in the hub's own cache, or the digest of a directory's Python files; None:
    no code may be run. Raises UserError where the code is not the one that was pinned.
    """
    if not pin or not (maps := _auto_maps(directory)):
        return False
    if foreign := next((value for value in maps if "--" in value), None):
        raise UserError(
            f"model.trust_remote_code: {directory} takes its code from another repository ({foreign}), which no revision pins; "
            "download that code into a directory and give the directory"
        )
    is_snapshot = directory.parent.name == "snapshots" and directory.is_relative_to(constants.HF_HUB_CACHE)
    found = directory.name if is_snapshot else code_digest(directory)
    if found != pin:
        raise UserError(
            f"model.trust_remote_code: the code in {directory} is not the one that you have pinned; read its *.py files, and "
            f"give model.revision={found}"
        )
    return True


def _auto_maps(directory: Path) -> list[str]:
    """Classes that the JSON files of a model name in Python files."""
    found: list[str] = []
    for file in sorted(directory.glob("*.json")):
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):
            continue
        named = content.get("auto_map") if isinstance(content, dict) else None
        for value in named.values() if isinstance(named, dict) else [named]:
            found += [str(each) for each in (value if isinstance(value, list) else [value]) if each]
    return found
