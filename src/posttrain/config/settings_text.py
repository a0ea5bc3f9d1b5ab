"""The text of a file of settings, and YAML in which a value is what the same letters are on the command line."""

from __future__ import annotations

import codecs
import re
from pathlib import Path

import yaml

from posttrain.errors import UserError
from posttrain.runs.yaml_files import Loader

_EXPONENT = (re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


class WithExponents(Loader):
    """YAML 1.1, as other tools read it, but with 1e-4 as a number."""


WithExponents.yaml_implicit_resolvers = {key: list(value) for key, value in Loader.yaml_implicit_resolvers.items()}
WithExponents.add_implicit_resolver("tag:yaml.org,2002:float", *_EXPONENT)


class Loader12(Loader):
    """YAML 1.2: 1e-4 is a number; yes, no, on, off, 12:00:00, 0123456 and a date are texts, as on the command line."""


_KEPT = ("tag:yaml.org,2002:null", "tag:yaml.org,2002:merge", "tag:yaml.org,2002:value")
Loader12.yaml_implicit_resolvers = {
    key: [(tag, pattern) for tag, pattern in value if tag in _KEPT] for key, value in Loader.yaml_implicit_resolvers.items()
}
for _tag, _pattern, _first in (
    ("bool", re.compile(r"(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF")),
    ("int", re.compile(r"[-+]?(?:0|[1-9][0-9_]*)$|0x[0-9a-fA-F]+$"), list("-+0123456789")),
    ("float", re.compile(r"[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9]+)$"), list("-+.0123456789")),
    ("float", *_EXPONENT),
    ("float", re.compile(r"[-+]?\.(?:inf|Inf|INF)$|\.(?:nan|NaN|NAN)$"), list("-+.")),
):
    Loader12.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _pattern, _first)


def settings_text(path: Path) -> str:
    """Without tabs, which YAML knows in quotes alone. Raises UserError with what to do about a text that is none."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error.strerror or str(error)) from None
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        wide = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
        raise _unreadable(path, "it is in UTF-16; save it as UTF-8" if wide else "it is no text in UTF-8") from None
    indented = next((n for n, line in enumerate(text.splitlines(), 1) if re.match(r"[ ]*\t\s*\S", line)), 0)
    if indented and not text.lstrip().startswith("{"):  # JSON may be indented by what it likes
        raise _unreadable(path, f"line {indented} begins with a tab; YAML is indented with spaces")
    return text.replace("\t", " ")


def _unreadable(path: Path, why: str) -> UserError:
    return UserError(f"--config: {path} cannot be read ({why})")


def why_not(error: Exception) -> str:
    """What YAML says, as one line."""
    return (" ".join(str(error).split()) if isinstance(error, yaml.YAMLError) else str(error))[:400]
