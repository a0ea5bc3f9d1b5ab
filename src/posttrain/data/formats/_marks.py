"""What a message says of how much it counts, and which of its characters do."""

from __future__ import annotations

import math
from typing import Any, cast

from posttrain.data.rows import Message
from posttrain.errors import UserError

# how much a message counts: OpenAI's weight, axolotl's train, ms-swift's loss and loss_scale, LLaMA-Factory's loss_weight; true
# is 1, false is 0
MARKS = ("weight", "train", "train_on_turn", "loss", "loss_scale", "loss_weight")
DETAILS = ("train_detail", "training_detail")  # axolotl's marks of characters
_LEARNT = ("train", "train_on_turn")  # those that hold whatever the role


def marks_of(item: dict[str, Any], content: Any, name: str) -> Message:
    """The message's marks: their product as its `weight`, `train` where it is learnt whatever its role, and `trained`, the
    characters start:stop of its content that are. Nothing where it has none. Raises UserError, which starts with `name`."""
    marks = {key: item[key] for key in MARKS if item.get(key) is not None}
    for key, value in marks.items():
        if not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise UserError(f"{key} of {name} is {value!r}, not true, false or a number from 0 on")
    found: Message = {"weight": math.prod(marks.values())} if marks else {}
    key = next((key for key in DETAILS if item.get(key)), None)
    if key:
        found["trained"] = _trained(item[key], content, f"{key} of {name}")
    return found | ({"train": True} if key or any(marks.get(name) for name in _LEARNT) else {})


def _trained(details: Any, content: Any, name: str) -> list[list[int]]:
    """axolotl's [{begin_offset, end_offset, train}], whose ends are included, as [start, stop) of what is trained."""
    if not isinstance(content, str):
        raise UserError(f"{name} marks letters of a content that is {type(content).__name__}; join its parts to one text")
    if not isinstance(details, list):
        raise UserError(f"{name} is {type(details).__name__}, not a list of begin_offset, end_offset and train")
    said: list[bool | None] = [None] * len(content)
    for k, detail in enumerate(cast("list[Any]", details)):
        given = cast("dict[str, Any]", detail) if isinstance(detail, dict) else {}
        start, end, train = given.get("begin_offset"), given.get("end_offset"), given.get("train")
        if type(start) is not int or type(end) is not int or not isinstance(train, bool):
            raise UserError(f"{name} has in place {k} no numbers begin_offset and end_offset with train, true or false")
        if not 0 <= start <= end < len(content):
            raise UserError(f"{name}: letters {start} to {end} (included) are not all among its 0 to {len(content) - 1}")
        if (not train) in said[start : end + 1]:
            raise UserError(f"{name} says both true and false of letter {start + said[start : end + 1].index(not train)}")
        said[start : end + 1] = [train] * (end + 1 - start)
    edges = [k for k in range(len(said) + 1) if (said[k : k + 1] == [True]) != (k > 0 and said[k - 1] is True)]
    return [[start, stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)]
