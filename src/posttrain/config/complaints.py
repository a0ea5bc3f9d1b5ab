"""What is said of a config that does not fit: one line with the key, and a near name."""

from __future__ import annotations

import re
from typing import Any

from pydantic import ValidationError

from posttrain.config.other_tools import meaning
from posttrain.config.schema import MixedSource
from posttrain.errors import did_you_mean
from posttrain.runs.earlier import NAMED_BY_USER


def unknown_key(key: str, known: list[str]) -> str:
    """The message about a key that does not exist, with a near name or the group that it belongs to."""
    if key in known:
        group = key.split(".")[0]
        hint = "+peft=lora (or another method)" if group == "peft" else f"another {group}="
        return f"{key} does not belong to the chosen {group}; it needs {hint}"
    if said := meaning(key):
        return f"unknown key '{key}' - {said}"
    last = key.rsplit(".", 1)[-1]
    same_end = [name for name in known if name.rsplit(".", 1)[-1] == last]
    hint = f" - did you mean '{same_end[0]}'?" if same_end else did_you_mean(key, known)
    return f"unknown key '{key}'{hint}"


def first_complaint(error: ValidationError, config: dict[str, Any]) -> str:
    complaints = error.errors()
    complaint = next((c for c in complaints if c["type"] == "extra_forbidden"), complaints[0])
    # the tags of unions (a method's name) stand in the location, but in no key of the user's
    path: list[str] = []
    tree: Any = config
    for part in complaint["loc"]:
        if isinstance(tree, dict) and part in tree:
            path.append(str(part))
            tree = tree[part]
        elif (isinstance(tree, list) and isinstance(part, int)) or complaint["type"] == "missing":
            path.append(str(part))
    key = ".".join(path)
    if complaint["type"] == "extra_forbidden":
        siblings = [name for name in _parent(config, path) if name != path[-1]]
        siblings = list(MixedSource.model_fields) if key.startswith(NAMED_BY_USER[:2]) else siblings
        return f"unknown key '{key}'{did_you_mean(path[-1], siblings)} (there are: {', '.join(siblings)})"
    if complaint["type"] == "missing":
        return f"{key} has no value; give {key}=..."
    message = complaint["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    if complaint["type"] == "value_error":
        return message if isinstance(tree, dict) or message.startswith(key) else f"{key}: {message}"  # of a section, or a field
    if key and path[-1] != str(complaint["loc"][-1]):  # a field of several kinds, each of which has its own complaint
        of_field = [c["msg"] for c in complaints if c["loc"][:-1] == complaint["loc"][:-1]]
        message = " or ".join([message, *(msg.removeprefix("Input should be ") for msg in of_field[1:])])
    message = re.sub(", unable to parse string as an? [a-z]+", "", message)
    choices = re.findall("'([^']+)'", message) if complaint["type"] == "literal_error" else []
    given = complaint["input"]
    quotes = "; put it in quotes" if complaint["type"] == "string_type" and isinstance(given, int | float) else ""
    return f"{key}: {message}{did_you_mean(str(given), choices)} (got {given!r}){quotes}"


def _parent(tree: Any, path: list[str]) -> list[str]:
    for part in path[:-1]:
        tree = tree[part]
    return list(tree)
