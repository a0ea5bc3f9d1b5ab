"""What a picture shows, in words: one prompt for all, a text file beside each, or a metadata file."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Literal

from posttrain.errors import UserError

TEXT_FIELDS = ("text", "caption", "prompt")


def captions_of(paths: list[Path], how: Literal["prompt", "files", "metadata"], prompt: str | None) -> list[str]:
    """A caption for each picture; all paths lie in one folder. Raises UserError naming the picture that has none."""
    if how == "prompt":
        if not prompt or not prompt.strip():
            raise UserError('data.instance_prompt: it is empty; say what the pictures show, such as "a sks dog"')
        return [prompt.strip()] * len(paths)
    return [_beside(path) for path in paths] if how == "files" else _from_metadata(paths)


def _beside(path: Path) -> str:
    file = path.with_suffix(".txt")
    if not file.is_file():
        raise UserError(f"data.captions: {path.name} has no {file.name} beside it; write one, or say data.captions=prompt")
    text = file.read_text(encoding="utf-8", errors="replace").strip()
    if not text:
        raise UserError(f"data.captions: {file.name} is empty")
    return " ".join(text.split())


def _from_metadata(paths: list[Path]) -> list[str]:
    """metadata.jsonl or metadata.csv with file_name and text, as the datasets library's image folders have it."""
    folder = paths[0].parent
    file = next((folder / name for name in ("metadata.jsonl", "metadata.csv") if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"data.captions: there is no metadata.jsonl or metadata.csv in {folder}")
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            rows = (
                [json.loads(line) for line in stream if line.strip()] if file.suffix == ".jsonl" else list(csv.DictReader(stream))
            )
        known = {Path(row["file_name"]).name: next(row[name] for name in TEXT_FIELDS if row.get(name)) for row in rows}
    except (ValueError, KeyError, TypeError, StopIteration, csv.Error) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"data.captions: {file.name} has a row without file_name and text, or cannot be read ({reason})"
        ) from None
    if missing := [path.name for path in paths if path.name not in known]:
        raise UserError(f"data.captions: {file.name} has no row for {missing[0]} (and {len(missing) - 1} more)")
    return [" ".join(str(known[path.name]).split()) for path in paths]


def words(text: str) -> list[str]:
    """Lower-case words, without punctuation."""
    return re.findall(r"[^\W_]+(?:[-'_][^\W_]+)*", text.lower())


def check_token(captions: list[str], class_prompt: str | None, token: str | None) -> str | None:
    """The word or words that stand for the individual: `token`, or what the first caption has and the class prompt has not.

    Raises UserError where a caption lacks it. None where nothing says what it is.
    """
    if token is None:
        if class_prompt is None:
            return None
        known = set(words(class_prompt))
        token = " ".join(word for word in words(captions[0]) if word not in known)
        if not token:
            raise UserError(
                f"data.instance_prompt: '{captions[0]}' has no token of its own beside data.class_prompt '{class_prompt}'; "
                f"put a rare word before the class, such as 'a sks dog'"
            )
        if len(set(captions)) > 1:  # captions of their own say many things; only a token that was named is looked for
            return None
    for caption in captions:
        if not set(words(token)) <= set(words(caption)):
            raise UserError(f"data.instance_prompt: '{caption}' lacks the token '{token}'; put it in, or set data.token")
    return token
