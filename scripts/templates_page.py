"""docs/templates.md: which of the stock chat templates in TRL's wheel train which rows exactly.

    python scripts/templates_page.py            # writes docs/templates.md

Exactly: the decoded stretches of trained tokens are the assistant's turns, each with all its words, calls and arguments and with
its end of turn, and with no word of anybody else. What is expected is known by hand (scripts/stock_templates.py), not by the
encoder.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.data.chat.encoder import Encoder
from posttrain.data.chat.options import ChatOptions
from posttrain.errors import UserError
from stock_templates import FOLDER, SPECIAL, end_of_turn, trained_texts

PAGE = Path(__file__).resolve().parents[1] / "docs" / "templates.md"
STOPS = {"glm4moe": ("<|user|>", "<|observation|>"), "gptoss": ("<|return|>", "<|call|>")}
STOPS |= dict.fromkeys(("gemma4", "diffusion_gemma"), ("<turn|>", "<|tool_response>"))
TOOL = {
    "name": "get_price",
    "description": "PRICE-OF",
    "parameters": {"type": "object", "properties": {"item": {"type": "string"}}},
}
CALL = {"name": "get_price", "arguments": json.dumps({"item": "green tea", "n": 3})}
MULTI = [("user", "QUESTION-1"), ("assistant", "ANSWER-1"), ("user", "QUESTION-2"), ("assistant", "ANSWER-2")]
HEAD = """\
# Chat templates

What each stock chat template in TRL's wheel does with rows of three kinds. Made by `scripts/templates_page.py`; do not edit.

- **multi-turn**: two questions with two answers.
- **tools**: a row as Glaive has them, twice: tools, a call whose arguments are JSON, its result, an answer; alone, and within a
  longer conversation. *as text*: the template knows no tools, or leaves arguments or tools out; `data.tools=inline` writes them
  into the contents. Without it such rows are refused; where only the tools are left out, that is said.
- **reasoning**: two answers with `reasoning_content`. *all turns*: every thought is trained where it stands. *last turn*: the
  template leaves the thoughts of earlier turns out; `data.turns=each` learns each turn as it was generated, `data.train_on=last`
  the last alone. *as text*: the template renders none; `data.reasoning=inline` writes it into the content between `<think>` tags.
  *refused*: it cuts them out of the content too.

**exact**: what is trained decodes to the assistant's turns with all their words and arguments and the end of each turn, and to
nothing of anybody else's. Templates named `..._training` are TRL's own variants with generation markers.

"""


def tokenizer_of(template: str) -> Any:
    """A tokenizer whose tokens are bytes and the template's special tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({letter: k for k, letter in enumerate(letters)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", bos_token="<s>")
    tokenizer.add_special_tokens(
        {"additional_special_tokens": sorted({*SPECIAL.findall(template), "<|call|>", "<|observation|>"})}
    )
    tokenizer.chat_template = template
    return tokenizer


def said(role: str, content: str, **more: Any) -> dict[str, Any]:
    """A message."""
    return {"role": role, "content": content, **more}


def trained(
    encoder: Encoder, tokenizer: Any, messages: list[dict[str, Any]], tools: list[Any] | None, first: int = 0
) -> list[str]:
    """The decoded stretches of trained tokens, white space and a lone end of text aside."""
    row = {"messages": messages, "tools": tools, "first": first}
    (found,) = encoder.encode_many([(1, row)], "row {}".format)
    texts = [text.strip() for text in trained_texts(tokenizer, found)]
    return [text for text in texts if text not in ("", "</s>")]


def is_exact(runs: list[str], turns: list[list[str]], ends: tuple[str, ...]) -> bool:
    """Is each run one turn: with its words, its end, and no word of another's?"""
    foreign = ["QUESTION", "RESULT", "PRICE-OF"]
    return len(runs) == len(turns) and all(
        all(word in run for word in words)
        and run.endswith(ends)
        and not any(word in run for word in foreign)
        and not any(word in run for other in turns if other is not words for word in other if word not in words)
        for run, words in zip(runs, turns, strict=True)
    )


class Template:
    """One template under test."""

    def __init__(self, name: str) -> None:
        base = name.removesuffix("_training")
        self._tokenizer = tokenizer_of((FOLDER / f"{name}.jinja").read_text(encoding="utf-8"))
        self._stops = next((stops for start, stops in STOPS.items() if base.startswith(start)), ())
        end = ("<|end|>", "<|return|>") if base.startswith("gptoss") else (end_of_turn(base),)
        self._ends = (*end, *self._stops)

    def _works(self, rows: Sequence[tuple[list[Any], list[Any] | None, list[list[str]], int]], **options: Any) -> bool:
        encoder = Encoder(self._tokenizer, self._stops, options=ChatOptions(on_loss="stop", **options))
        try:
            return all(
                is_exact(trained(encoder, self._tokenizer, messages, tools, first), turns, self._ends)
                for messages, tools, turns, first in rows
            )
        except UserError:
            return False

    def multi(self) -> str:
        """The cell of two questions with two answers."""
        return "exact" if self._works([([said(*each) for each in MULTI], None, [["ANSWER-1"], ["ANSWER-2"]], 0)]) else "refused"

    def tools(self) -> str:
        """The cell of rows as Glaive has them."""
        call = said("assistant", "", tool_calls=[{"id": "call00001", "type": "function", "function": CALL}])
        result = said("tool", '{"price": "RESULT"}', name="get_price", tool_call_id="call00001")
        short = [said("user", "QUESTION-1"), call, result, said("assistant", "ANSWER-1")]
        around = [
            said("user", "QUESTION-0"),
            said("assistant", "ANSWER-0"),
            *short,
            said("user", "QUESTION-2"),
            said("assistant", "ANSWER-2"),
        ]
        turns = [["get_price", "green tea", "3", "item"], ["ANSWER-1"]]
        rows = [(short, [TOOL], turns, 0), (around, [TOOL], [["ANSWER-0"], *turns, ["ANSWER-2"]], 0)]
        return "exact" if self._works(rows) else "exact, as text" if self._works(rows, tools="inline") else "refused"

    def reasoning(self) -> str:
        """The cell of two answers with thoughts."""
        messages = [said(*each) for each in MULTI]
        messages[1]["reasoning_content"], messages[3]["reasoning_content"] = "THOUGHT-1", "THOUGHT-2"
        turns = [["THOUGHT-1", "ANSWER-1"], ["THOUGHT-2", "ANSWER-2"]]
        if self._works([(messages, None, turns, 0)]):
            return "exact, all turns"
        if self._works([(messages[:2], None, turns[:1], 1), (messages, None, turns[1:], 3)]):
            return "exact, last turn"
        if self._works([(messages, None, turns, 0)], reasoning="inline"):
            return "exact, as text"
        each = [(messages[:2], None, turns[:1], 1), (messages, None, turns[1:], 3)]
        return "exact, last turn, as text" if self._works(each, reasoning="inline") else "refused"


def page() -> str:
    """The whole page."""
    names = sorted(path.stem for path in FOLDER.glob("*.jinja"))
    rows = [(name, found.multi(), found.tools(), found.reasoning()) for name in names for found in [Template(name)]]
    counts = [sum(row[k].startswith("exact") for row in rows) for k in (1, 2, 3)]
    plain = [sum(row[k] == "exact" or row[k].endswith("turns") for row in rows) for k in (1, 2, 3)]
    total = f"Of {len(rows)} templates {counts[0]}, {counts[1]} and {counts[2]} are exact: "
    total += f"{plain[0]}, {plain[1]} and {plain[2]} of them without an option.\n"
    table = [
        "| template | multi-turn | tools | reasoning |",
        "|---|---|---|---|",
        *("| " + " | ".join(row) + " |" for row in rows),
    ]
    return HEAD + total + "\n" + "\n".join(table) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}")
