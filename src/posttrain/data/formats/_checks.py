"""What all rows have in common, whatever their format: a label, no pictures, and letters that a tokenizer can read."""

from __future__ import annotations

from typing import Any

from posttrain.data.rows import CanonicalRow, Row
from posttrain.errors import UserError

_MEDIA = ("image", "images", "video", "videos", "audio", "audios")
_PLACES = ("<image>", "<video>", "<audio>")  # where a picture stands in a conversation


def refuse_media(row: Row, canonical: CanonicalRow) -> None:
    """Raises UserError for a row with pictures, or with a place for one: its words alone would be trained as if they were all."""
    if name := next((name for name in _MEDIA if name in row and _holds(row[name])), None):
        raise UserError(
            f"has a column {name}, and only text can be trained on so far; drop the row, or, if the text stands for itself, "
            f"call the column otherwise (data.columns.left_out={name})"
        )
    if "text" in canonical:
        return
    for path, text in texts_of(canonical):
        if place := next((place for place in _PLACES if place in text), None):
            raise UserError(f"{path} holds {place}, and only text can be trained on so far; drop the row, or take {place} out")


def label_of(row: Row) -> dict[str, bool]:
    """KTO's mark by its column's name: false of an answer that is not to be learnt. Empty where there is none; a number is
    something else."""
    said = {name: str(row[name]).lower() for name in ("label", "kto_tag") if name in row}
    return {name: value == "true" for name, value in said.items() if value in ("true", "false")}


def refuse_surrogates(canonical: CanonicalRow) -> None:
    """Raises UserError for half a letter of two (\\ud800), which no tokenizer can read."""
    for path, text in texts_of(canonical):
        if text.isascii():
            continue
        try:
            text.encode()
        except UnicodeEncodeError as error:
            half = f"\\u{ord(text[error.start]):04x}"
            raise UserError(
                f"{path} holds half a letter ({half}, at letter {error.start + 1}); mend it, or drop the row"
            ) from None


def texts_of(canonical: CanonicalRow) -> list[tuple[str, str]]:
    """All texts of a canonical row with where they stand (`messages[1].content`); those of other columns are not among them."""
    return [found for name, value in canonical.items() if name != "columns" for found in _texts(value, name)]


def _texts(value: Any, path: str) -> list[tuple[str, str]]:
    if isinstance(value, str):
        return [(path, value)]
    if isinstance(value, dict):
        return [found for key, each in value.items() for found in _texts(each, f"{path}.{key}")]
    if isinstance(value, list):
        return [found for k, each in enumerate(value) for found in _texts(each, f"{path}[{k}]")]
    return []


def _holds(value: object) -> bool:
    return value is not None and value != [] and value != "" and value == value
