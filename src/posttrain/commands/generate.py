"""`posttrain generate`: answers to a file of prompts, with their log-probs and what they are worth, and the rows made of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor

from posttrain.commands.answers_file import Answers, best_rows, check_files, pair_rows
from posttrain.commands.words import runs_and_settings
from posttrain.config.fields import Strict
from posttrain.config.schema import RewardConfig
from posttrain.config.words import value_of
from posttrain.console import Meter, say
from posttrain.data.prepare import canonical_rows
from posttrain.data.row_use import RowUse
from posttrain.data.rows import CanonicalRow, prompt_of, reference_of
from posttrain.errors import UserError
from posttrain.models.language.generation import Answer, Sampling, sample
from posttrain.models.language.loading import LoadedModel, base_digest, writing
from posttrain.models.language.one_base import Load, one_load
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.run_data import data_of, of_file
from posttrain.rewards import RewardFunction, check_options, columns_by_name, combined, load_function
from posttrain.runs.artifact import open_artifact
from posttrain.runs.cache_place import cache_root
from posttrain.runs.files import write_text
from posttrain.runs.identity import content_hash
from posttrain.training.seeding import row_seed

KEYS = ("reward.function", "reward.options", "reward.weights", "reward.timeout")  # of `reward`; the others shape what is learnt
NO_REWARD = dict.fromkeys(RewardConfig.model_fields) | {"timeout": 600, "whiten": False, "missing_eos_penalty": 0.0}
PROMPTS = RowUse(
    name="generate",
    takes=("prompts", "messages", "prompt_completion", "pairs"),
    examples="prompts",
    needs="prompts: prompt alone, messages, instruction and output, prompt and completion, or prompt, chosen and rejected",
)


@dataclass(frozen=True)
class Wanted:
    """What is asked for. to: None for a file in the cache, found by all that the answers are made from. temperature 0: the
    likeliest token. best_of, pairs: files of rows; at_least: the score that a row's best answer needs to be one of them. part:
    (2, 3): the second of three parts of the prompts, every third one. most: prompts, from the first; None: all."""

    to: Path | None
    samples: int
    temperature: float
    top_p: float
    max_new_tokens: int
    seed: int
    batch_size: int
    stop: tuple[str, ...] = ()
    best_of: Path | None = None
    pairs: Path | None = None
    at_least: float | None = None
    part: tuple[int, int] = (1, 1)
    most: int | None = None

    @property
    def drawing(self) -> dict[str, Any]:
        """What decides which answers are drawn, but for the model and the prompt."""
        return {k: v for k, v in asdict(self).items() if k not in ("to", "best_of", "pairs", "at_least", "part", "most")}

    def sampling(self, decode: Callable[[list[int]], str]) -> Sampling:
        """As the sampler has it."""
        how = (self.temperature, self.top_p, 0) if self.temperature else (1.0, 1.0, 1)
        return Sampling(self.max_new_tokens, *how, max(self.batch_size, self.samples), self.stop, decode)


class _Section(Strict):
    reward: RewardConfig


def generate(words: list[str], wanted: Wanted, load: Load | None = None) -> list[dict[str, Any]]:
    """Answer the prompts of a file by a run's result or a bare model; returns the lines of `wanted.to`, one a prompt, in order.

    words: the run, the file, `data.KEY=` in place of how the run read its rows, and `reward.KEY=` for scores. Lines that are in
    the file are not made again, whatever stopped it; a file of another model, prompt or setting is refused. An answer's random
    numbers follow from the seed and its prompt's row. load: of a run, where another's base may be in memory already. Raises
    UserError before a model is loaded.
    """
    given, settings, of_data = runs_and_settings(words, KEYS)
    if len(given) != 2:
        raise UserError("give a run (or a model) and a file of prompts: posttrain generate RUN prompts.jsonl --to answers.jsonl")
    _check(wanted, settings)
    check_files({"the prompts": Path(given[1]), "--to": wanted.to, "--best-of": wanted.best_of, "--pairs": wanted.pairs})
    reward, functions = _rewards(settings)
    artifact = open_artifact(given[0], "run").supported()
    writing(artifact)
    data = of_file(data_of(artifact, of_data), given[1], 1).model_copy(update={"max_rows": None})
    rows = canonical_rows(data, PROMPTS)[wanted.part[0] - 1 :: wanted.part[1]][: wanted.most]
    if not rows:
        raise UserError(f"{given[1]}: it has no prompts")
    functions = [_tried_out(function, rows) for function in functions]
    model = {"weights": artifact.digest, "base": base_digest(artifact)}
    made = [model, wanted.drawing, of_data, reward.model_dump(include={"function", "options", "weights"})]
    keys = [_key(made, number, row) for number, row in rows]
    to = wanted.to or cache_root() / "answers" / f"{content_hash(*keys)[:16]}.jsonl"
    answers = Answers(to, keys)
    if missing := len(answers.keys) - len(answers.lines):
        say(f"{missing} of {len(rows)} prompts to answer, {wanted.samples} times each -> {to}")
        _answer((load or one_load)(given[0], of_data), rows, answers, wanted, reward, functions)
    else:
        say(f"{to} has all {len(rows)} prompts answered: nothing to generate")
    found = answers.in_order()
    _tell(found, wanted)
    return found


def _check(wanted: Wanted, settings: dict[str, str]) -> None:
    if not wanted.temperature and wanted.samples > 1:
        raise UserError("--temperature: 0 draws the likeliest token, so all answers are one; give -n 1 or a temperature above 0")
    rows_of = (
        "--best-of" if wanted.best_of else "--pairs" if wanted.pairs else "--at-least" if wanted.at_least is not None else ""
    )
    if "" in wanted.stop:
        raise UserError("--stop: an empty text would end every answer at its first token; leave it out")
    if rows_of and "reward.function" not in settings:
        raise UserError(f"{rows_of}: nothing says which answer is better; give reward.function=NAME, or module:name")
    if wanted.pairs and wanted.samples < 2:
        raise UserError("--pairs: a pair needs two answers to a prompt; give -n 2 or more")
    if wanted.at_least is not None and not wanted.best_of:
        raise UserError("--at-least: it says which answers --best-of writes; give --best-of FILE")


def _rewards(settings: dict[str, str]) -> tuple[RewardConfig, list[RewardFunction]]:
    """Raises UserError for what does not fit."""
    if settings and "reward.function" not in settings:
        raise UserError(f"{next(iter(settings))}: there is no reward; give reward.function=NAME, or module:name")
    given: dict[str, Any] = {**NO_REWARD, "function": []}
    for key, text in settings.items():
        *way, last = key.split(".")[1:]
        place = given
        for name in way:
            place[name] = dict(place.get(name) or {})
            place = place[name]
        place[last] = value_of(text, key)
    try:
        reward = _Section.model_validate({"reward": given}).reward
    except ValidationError as error:
        from posttrain.config.compose import first_complaint

        raise UserError(first_complaint(error, {"reward": given})) from None
    check_options(reward.options, reward.function)
    if reward.weights and len(reward.weights) != len(reward.function):
        raise UserError(f"reward.weights: {len(reward.weights)} for {len(reward.function)} functions; give one each")
    return reward, [load_function(name, "reward.function", reward.options, reward.timeout) for name in reward.function]


def _tried_out(function: RewardFunction, rows: list[tuple[int, CanonicalRow]]) -> RewardFunction:
    columns, answered = {name for _, row in rows for name in row.get("columns", {})}, any(reference_of(row) for _, row in rows)
    function = function.of_rows(columns, answered, "reward.function")
    some = [row for _, row in rows[:2]]
    known = [reference_of(row) for row in some]
    function.try_out([str(prompt_of(row)[-1]["content"]) for row in some], known, known, _columns(some), "reward.function")
    return function


def _columns(rows: list[CanonicalRow]) -> dict[str, list[Any]]:
    return columns_by_name([row.get("columns", {}) for row in rows])


def _key(made: list[Any], number: int, row: CanonicalRow) -> str:
    """What a line of the file was made from."""
    return hashlib.sha256(json.dumps([made, number, row], sort_keys=True, default=str).encode()).hexdigest()[:16]


def _answer(
    live: LoadedModel, rows: list[tuple[int, CanonicalRow]], answers: Answers, wanted: Wanted, reward: RewardConfig,
    functions: list[RewardFunction],
) -> None:  # fmt: skip
    """Batches are the same however often it was stopped: one that lacks a line is drawn as a whole, with the same bits."""
    lm, encoder = PackedLM(live.model, kernels=live.kernels), live.encoder
    sampling = wanted.sampling(lambda tokens: live.tokenizer.decode(tokens, skip_special_tokens=True))
    size = max(1, wanted.batch_size // wanted.samples)
    batches = [range(start, min(start + size, len(rows))) for start in range(0, len(rows), size)]
    todo = [batch for batch in batches if any(answers.keys[i] not in answers.lines for i in batch)]
    with Meter("answers", len(todo)) as meter:
        for batch in todo:
            some = [rows[i][1] for i in batch]
            prompts = [encoder.encode_prompt(row) for row in some]
            seeds = [row_seed(wanted.seed, rows[i][0], 0, 0) for i in batch]
            drawn = sample(lm, prompts, wanted.samples, sampling, encoder.end_tokens(), seeds)
            texts = [[live.tokenizer.decode(each.tokens, skip_special_tokens=True) for each in group] for group in drawn]
            read = [live.tokenizer.decode(tokens) for tokens in prompts]
            scores = _scores(functions, some, read, texts)
            total = (
                combined(scores, torch.tensor([each.ended for group in drawn for each in group]), reward)[0] if scores else None
            )
            told = _told(functions, scores, total)
            lines = []
            for i, row, group, said in zip(batch, some, drawn, texts, strict=True):
                prompt = prompt_of(row) if encoder.options.renders(row) else row["prompt"]
                line = {"key": answers.keys[i], "row": rows[i][0], "prompt": prompt}
                line |= {name: row[name] for name in ("tools", "columns") if row.get(name)}
                lines.append(line | {"answers": [_line(*each) | next(told) for each in zip(said, group, strict=True)]})
            answers.add(lines)
            meter.advance()


def _line(text: str, answer: Answer) -> dict[str, Any]:
    logps = [round(logp, 6) for logp in answer.logps]
    return {
        "text": text,
        "ended": answer.ended,
        "tokens": len(answer.tokens),
        "logp": round(sum(answer.logps), 6),
        "logps": logps,
    }


def _scores(
    functions: list[RewardFunction], rows: list[CanonicalRow], prompts: list[str], texts: list[list[str]]
) -> list[Tensor]:
    """Of each function, one for each answer."""
    each = [row for row, said in zip(rows, texts, strict=True) for _ in said]
    asked = [prompt for prompt, said in zip(prompts, texts, strict=True) for _ in said]
    flat = [text for said in texts for text in said]
    return [function(asked, flat, [reference_of(row) for row in each], _columns(each)) for function in functions]


def _told(functions: list[RewardFunction], scores: list[Tensor], total: Tensor | None) -> Iterator[dict[str, Any]]:
    """What a line has of the scores, for one answer after another: none where none applies."""
    if total is None:
        while True:
            yield {}
    for i, value in enumerate(total.tolist()):
        own = {f.name: None if score[i].isnan() else float(score[i]) for f, score in zip(functions, scores, strict=True)}
        yield {"score": value if any(v is not None for v in own.values()) else None} | ({"scores": own} if len(own) > 1 else {})


def _tell(found: list[dict[str, Any]], wanted: Wanted) -> None:
    """Say what was drawn, and write the rows that are asked for."""
    answers = [answer for line in found for answer in line["answers"]]
    ended, tokens = sum(each["ended"] for each in answers), sum(each["tokens"] for each in answers)
    say(
        f"{len(answers)} answers to {len(found)} prompts, {tokens / len(answers):.1f} tokens each, "
        f"{ended / len(answers):.0%} ended"
    )
    if scored := [answer["score"] for answer in answers if answer.get("score") is not None]:
        groups = [[a["score"] for a in line["answers"] if a["score"] is not None] for line in found]
        best = [max(group) for group in groups if group]
        say(f"score {sum(scored) / len(scored):.4f} in the mean, {sum(best) / len(best):.4f} of each prompt's best")
    elif any("score" in answer for answer in answers):
        say("no reward applies to any of these answers, so none has a score")
    for path, rows in ((wanted.best_of, best_rows(found, wanted.at_least)), (wanted.pairs, pair_rows(found))):
        if path:
            write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            say(f"{len(rows)} rows of {len(found)} prompts -> {path}; {len(found) - len(rows)} prompts had none to give")
