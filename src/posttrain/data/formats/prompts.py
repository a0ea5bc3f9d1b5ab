"""Prompts alone, which a policy answers: a text or messages. Their other columns are for reward functions."""

from __future__ import annotations

from posttrain.data.formats import Format
from posttrain.data.formats._columns import exchange, history_of, instruction_of, system_of, text_of
from posttrain.data.formats._conversations import check_order, tools_of
from posttrain.data.formats._messages import messages, unpacked
from posttrain.data.rows import CanonicalRow, Row
from posttrain.errors import UserError

_NAMES = ("prompt", "query", "question", "instruction")


def _to_canonical(row: Row) -> CanonicalRow:
    name = next((n for n in _NAMES if n in row), _NAMES[0])
    prompt = unpacked(row.get(name))
    before = [*system_of(row), *history_of(row)]
    if isinstance(prompt, list):
        whole = [*before, *messages(prompt, name)]
        check_order(whole, name)
        if whole[-1]["role"] == "assistant":
            raise UserError(f"{name} ends with the assistant's message, where it is to answer; end with the user's")
        return {"prompt": whole, **tools_of(row)}
    text = instruction_of(row) if name == "instruction" else text_of(row, name)
    tools = tools_of(row)
    return {"prompt": [*before, *exchange(text, "")[:1]] if before or tools else text, **tools}


FORMAT = Format(
    columns="prompt, query, question or instruction, without an answer",
    kind="prompts",
    precedence=5,
    recognises=lambda row: any(name in row for name in _NAMES),
    to_canonical=_to_canonical,
    example={"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "solution": "4"},
    example_becomes={"prompt": [{"role": "user", "content": "What is 2 + 2?"}], "columns": {"solution": "4"}},
)
