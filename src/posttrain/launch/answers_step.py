"""A step of a recipe that trains nothing: `posttrain generate` by the step before, whose rows the next one is trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from posttrain.config.code import require_own_words
from posttrain.config.fields import NonNegative, Positive, Strict, Weight, listed
from posttrain.config.words import part_of, value_of
from posttrain.errors import UserError, did_you_mean

GENERATE = "generate"  # instead of a stage
ROWS = "rows.jsonl"  # in the step's directory: what the next step is trained on
WORDS = ("reward.", "data.")  # of the keys that go on to the command as they are


class _Answers(Strict):
    """What a recipe may say of it; as the options of `posttrain generate`."""

    prompts: str
    rows: Literal["pairs", "best"] = "pairs"
    samples: Positive = 4
    max_new_tokens: Positive = 256
    temperature: Weight = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: NonNegative = 0
    batch_size: Positive = 32
    stop: Annotated[tuple[str, ...], BeforeValidator(listed)] = ()
    part: str | None = None
    at_least: float | None = None


def answers_config(words: Sequence[str], said: Sequence[str]) -> dict[str, Any]:
    """The config of the step, with the words that go on to the command under `words`. said: those of the user, after the
    recipe's. Raises UserError."""
    given: dict[str, Any] = {}
    further: dict[str, str] = {}
    for word in [*words, *said]:
        key, _, value = word.lstrip("+").partition("=")
        if key.startswith(WORDS):
            further[key] = value
        elif key in _Answers.model_fields:
            given[key] = value_of(value, key) if key != "part" else value
        else:
            known = [*_Answers.model_fields, "reward.KEY", "data.KEY"]
            raise UserError(f"unknown key '{key}'{did_you_mean(key, known)} (there are: {', '.join(known)})")
    try:
        found = _Answers.model_validate(given)
    except ValidationError as error:
        first = error.errors()[0]
        raise UserError(f"{'.'.join(map(str, first['loc']))}: {first['msg']}") from None
    if found.part:
        part_of(found.part, "part")
    if "reward.function" not in further:
        raise UserError("reward.function: nothing says which answer is better; give a reward's name")
    require_own_words({key: value_of(value, key) for key, value in further.items()}, said)
    return {"stage": GENERATE, **found.model_dump(), "words": further}


def answers_command(config: dict[str, Any], directory: Path) -> list[str]:
    """The words of `posttrain generate` that makes the step's rows."""
    options = {
        "--to": directory / "answers.jsonl",
        {"pairs": "--pairs", "best": "--best-of"}[config["rows"]]: directory / ROWS,
        **{f"--{key.replace('_', '-')}": config[key] for key in ("samples", "max_new_tokens", "temperature", "top_p", "seed")},
        "--batch-size": config["batch_size"],
        "--part": config["part"],
        "--at-least": config["at_least"],
    }
    words = [f"{key}={value}" for key, value in config["words"].items()]
    said = [each for key, value in options.items() if value is not None for each in (key, str(value))]
    said += [each for text in config["stop"] for each in ("--stop", text)]
    return [GENERATE, config["init"], config["prompts"], *words, *said]
