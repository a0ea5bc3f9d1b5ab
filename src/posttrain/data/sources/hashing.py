"""Numbers that content alone decides, the same on every machine."""

from __future__ import annotations

import hashlib


def fraction(content: bytes) -> float:
    """A number in [0, 1) from the sha256 of the content."""
    return int.from_bytes(hashlib.sha256(content).digest()[:6]) / 2**48
