"""What a model answers to held-out prompts while it is trained, and what that is worth (`eval.generate`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from posttrain.config.metrics import ANSWERS
from posttrain.config.schema import LanguageStage
from posttrain.console import say
from posttrain.data.examples import Examples
from posttrain.errors import UserError
from posttrain.models.language.generation import Answer, Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.rewards import RewardFunction, check_options, load_function
from posttrain.stages.language.samples import keep_samples
from posttrain.training.processes import Processes
from posttrain.training.seeding import row_seed

PART = 9000  # the part of a run's random numbers that these answers use
BEGINNING = 64  # tokens of a document that its continuation is asked for, at most
FIELD = "eval.generate.metrics"


@dataclass(frozen=True)
class HeldOutPrompts:
    """prompts: token ids; texts: the same as text; references: the data's own answers. functions: what answers are scored by."""

    prompts: list[list[int]]
    texts: list[str]
    references: list[str]
    functions: list[RewardFunction]
    sampling: Sampling
    ends: list[int]
    seed: int

    def measure(self, lm: PackedLM, processes: Processes, keep: Callable[..., None]) -> dict[str, float]:
        """answers/NAME by each function over the answers to which it applies, eval/length in tokens, and eval/ended, the share
        that ended by themselves. keep: takes prompts, answers, scores and references for the page; rank 0 calls it."""
        seeds = [row_seed(self.seed, 0, PART, i) for i in range(len(self.prompts))]
        drawn = [answers[0] for answers in sample(lm, self.prompts, 1, self.sampling, self.ends, seeds)]
        return processes.told(lambda: self._scored(drawn, keep))

    def _scored(self, drawn: list[Answer], keep: Callable[..., None]) -> dict[str, float]:
        assert self.sampling.decode
        said = [self.sampling.decode(answer.tokens) for answer in drawn]
        columns = {function.short_name: function(self.texts, said, self.references) for function in self.functions}
        rows = [{name: float(column[i]) for name, column in columns.items() if not column[i].isnan()} for i in range(len(said))]
        keep(self.texts, said, rows, self.references)
        found = {f"{ANSWERS}/{name}": float(column.nanmean()) for name, column in columns.items() if not column.isnan().all()}
        lengths, ended = [len(answer.tokens) for answer in drawn], [answer.ended for answer in drawn]
        return found | {"eval/length": sum(lengths) / len(lengths), "eval/ended": sum(ended) / len(ended)}


def held_out_prompts(cfg: LanguageStage, held_out: Examples, tokenizer: Any, ends: list[int]) -> HeldOutPrompts | None:
    """The first held-out rows as prompts; None where none is asked for. Raises UserError before a model is loaded."""
    wanted = cfg.eval.generate
    if not wanted.prompts:
        if wanted.metrics:
            raise UserError(f"{FIELD}: they score answers, and none is asked for; give eval.generate.prompts=16")
        return None
    check_options(wanted.options, wanted.metrics, "eval.generate.options", FIELD)
    functions = [load_function(name, FIELD, wanted.options) for name in wanted.metrics]
    if double := next((each.name for each in functions if [f.short_name for f in functions].count(each.short_name) > 1), None):
        raise UserError(f"{FIELD}: '{double}' has the name of another; leave one of them out")
    cut = [prompt_and_answer(held_out, i) for i in range(min(len(held_out.rows), wanted.prompts))]
    if not cut:
        raise UserError("eval.generate.prompts: no row is held out; give data.eval_rows or data.eval_path")
    if len(cut) < wanted.prompts:
        say(f"eval.generate: {len(cut)} prompts, for so many sequences are held out")
    decode = partial(tokenizer.decode, skip_special_tokens=True)
    texts, references = [tokenizer.decode(prompt) for prompt, _ in cut], [decode(answer) for _, answer in cut]
    functions = [function.of_rows((), True, FIELD) for function in functions]
    for function in functions:
        function.try_out(texts[:2], references[:2], references[:2], {}, FIELD)
    how = (wanted.temperature, 1.0, 0) if wanted.temperature else (1.0, 1.0, 1)  # 0: the likeliest token
    sampling = Sampling(wanted.max_new_tokens, *how, cfg.train.batch_size, decode=decode)
    return HeldOutPrompts([prompt for prompt, _ in cut], texts, references, functions, sampling, ends, cfg.train.seed)


def prompt_and_answer(examples: Examples, i: int) -> tuple[list[int], list[int]]:
    """Sequence i up to its answer, and the answer: of a pair the better one, of a conversation the last part that is trained, of
    a document what follows its first half, or its first BEGINNING tokens."""
    tokens, weights = examples.sequence(i)
    if len(examples.splits):
        start, end = (int(border) for border in examples.splits[i])
        return tokens[:start].tolist(), tokens[start:end].tolist()
    counts = np.flatnonzero(weights)
    end = int(counts[-1]) + 1 if len(counts) else len(tokens)
    silent = np.flatnonzero(weights[:end] == 0)
    start = int(silent[-1]) + 1 if len(silent) else 0
    if start < 2:  # a document, all of which is trained, but perhaps for its first token
        start = max(1, min(BEGINNING, len(tokens) // 2))
    return tokens[:start].tolist(), tokens[start:end].tolist()


def keeper(directory: Path, done: int, num_steps: int) -> Callable[..., None]:
    """Keeps answers after so many steps for the run's page."""
    return partial(keep_samples, directory, done, num_steps)
