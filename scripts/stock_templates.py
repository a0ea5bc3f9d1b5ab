"""The chat templates that models ship, as TRL's wheel has them, and what is known of each by hand, from the models' cards."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

_TRL = importlib.util.find_spec("trl")
IS_THERE = bool(_TRL and _TRL.submodule_search_locations)
FOLDER = Path(next(iter(_TRL.submodule_search_locations or ["."])) if _TRL else ".") / "chat_templates"
STOCK = sorted(path.stem for path in FOLDER.glob("*.jinja") if not path.stem.endswith("_training"))
SPECIAL = re.compile(r"<[|\uff5c][^<>\n' ]*>|<[^<>|\n' ]+[|\uff5c]>|<(?:start|end)_of_\w+>|</s>|\[gMASK\]|<sop>")

# The tokens that end an assistant turn.
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>",
    "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<\uff5cend▁of▁sentence\uff5c>",
    "diffusion_gemma": "<turn|>",
    "gemma": "<end_of_turn>",
    "gemma4": "<turn|>",
    "glm4moe": "<|user|>",
    "idefics3": "<end_of_utterance>",
    "lfm2": "<|im_end|>",
    "llama3": "<|eot_id|>",
    "llava_next": "</s>",
    "muse_glimmer": "<|eot|>",
    "nemotron": "<|im_end|>",
    "phi3": "<|end|>",
    "qwen": "<|im_end|>",
    "smolvlm": "<end_of_utterance>",
}
# What a template puts between its generation prompt and the content: the model's to write, so it is trained.
WRITTEN_LEAD = {
    "glm4moe": ["\n<think></think>\n", "\n"],
    "gptoss": ["<|channel|>final<|message|>"],
    "muse_glimmer": [" to=user<|message|>"],
    "qwen3": ["<think>\n\n</think>\n\n", "\n</think>\n\n", "\n\n</think>\n\n"],
}
THINK = "<think>\nhm so\n</think>\n\n"


def leads_of(table: dict[str, list[str]], name: str) -> list[str]:
    """What the template of this name may write before an answer, by the longest key that the name begins with."""
    return table.get(max((key for key in table if name.startswith(key)), key=len, default=""), [])


def end_of_turn(name: str) -> str:
    """What ends an assistant's turn in the template of this name."""
    return ENDS[max((key for key in ENDS if name.startswith(key)), key=len)]


def allowed(content: str) -> set[str]:
    """What a template may make of an assistant's content: as it is, trimmed, without thoughts or with them first."""
    answer = content.split("</think>")[-1]
    forms = {content, answer, "".join(content.split("<think>\n")), f"\n{THINK.strip()}\n{answer.strip()}"}
    forms |= {f"\n<think>hm so</think>\n{answer.strip()}"} if THINK in content else set()
    trimmed = {f for form in forms for f in (form, form.strip(), form.lstrip("\n"), form.rstrip())}
    return trimmed | {" " + form for form in trimmed}  # " ": the header of "Assistant: yes" has no space of its own


def trained_runs(tokens: Sequence[int], weights: Sequence[float]) -> list[list[int]]:
    """The stretches of trained tokens."""
    grouped = groupby(zip(tokens, weights, strict=True), lambda pair: bool(pair[1]))
    return [[token for token, _ in run] for is_trained, run in grouped if is_trained]


def trained_texts(tokenizer: Any, encoded: Any) -> list[str]:
    """`trained_runs` of an encoded row, decoded."""
    return [str(tokenizer.decode(run)) for run in trained_runs(encoded.tokens, encoded.weights)]
