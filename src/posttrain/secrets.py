"""Tokens, keys and passwords, which must not reach a log, a file or a page."""

from __future__ import annotations

import os
import re

_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|PASSWD|CREDENTIAL|API_?KEY|ACCESS_?KEY|PRIVATE_?KEY", re.IGNORECASE)
_SHORTEST = 8  # what is shorter is likelier a word than a secret
_SHAPES = re.compile(
    r"\bhf_[A-Za-z0-9]{20,}|\bsk-[\w-]{20,}|\bgh[pousr]_[A-Za-z0-9]{20,}|\bglpat-[\w-]{20,}|\bxox[abpr]-[\w-]{10,}"
    r"|\bAKIA[0-9A-Z]{16}\b|\beyJ[\w-]{10,}\.[\w-]{10,}\.[\w-]{10,}"
    r"|(?<=://)[^/\s:@'\"]+:[^/\s@'\"]+(?=@)|(?<=[?&]token=)[^&\s'\"]+|(?<=Bearer )[\w.~+/-]{8,}"
)
HIDDEN = "<hidden>"


def redact(text: str) -> str:
    """`text` without what looks like a secret, and without the values of environment variables that are called like one."""
    for name, value in os.environ.items():
        if len(value) >= _SHORTEST and value in text and _NAMES.search(name) and not value.isdigit():
            text = text.replace(value, HIDDEN)
    return _SHAPES.sub(HIDDEN, text)
