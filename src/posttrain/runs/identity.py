"""A name for what a config asks for."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from pydantic import BaseModel

NOT_PART_OF_A_RUN = ("run", "tracker", "resume")  # what may differ between two starts of the same run


def digest(config: BaseModel | dict[str, Any]) -> str:
    """sha256 of the canonical JSON of everything that can change the result."""
    plain = config.model_dump(mode="json") if isinstance(config, BaseModel) else config
    kept = {key: value for key, value in plain.items() if key not in NOT_PART_OF_A_RUN}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()


def content_hash(*parts: Any) -> str:
    """A short name for what can be written as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:32]
