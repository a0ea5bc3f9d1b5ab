"""The one folder for what can be made again: converted models, tokenised data, reference log-probs, measurements."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def cache_root() -> Path:
    """$POSTTRAIN_CACHE, or posttrain in the platform's cache directory."""
    if chosen := os.environ.get("POSTTRAIN_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "darwin":
        return Path.home() / "Library" / "Caches" / "posttrain"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA", Path.home())) / "posttrain"
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "posttrain"
