"""What a live run says of held-out rows, for the files that are written of it to be held against."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from posttrain.console import say
from posttrain.errors import RunError
from posttrain.evaluation.agreement import agreement, held_out_rows, trained_rows, write_logprobs
from posttrain.models.language.loading import load_model

FIGURES = "export.json"
PROMPT, PROMPTS, ANSWER = 16, 4, 24  # tokens of a prompt, prompts, tokens of a greedy answer


@dataclass(frozen=True)
class Heard:
    """The live run's words: log-probs of `rows` at `file`, and greedy `answers`. ends: ids of the tokens at which it stops.
    calibration: rows that it was trained on, where they were asked for."""

    tokenizer: Any
    ends: list[int]
    rows: list[Tensor]
    answers: list[list[int]]
    file: Path
    calibration: list[Tensor]

    def against(self, model: Any, dtype: str, max_kl: float) -> dict[str, Any]:
        """Figures of `model`, which was read back from what was written in `dtype`. Raises RunError above the budget."""
        found = agreement(self.file, model, self.rows)
        same = sum(a == b for a, b in zip(self.answers, _greedy(model, self.rows, self.ends), strict=True))
        say(
            f"read back: {found.kl:.2e} nats a token from the live model, same top token {found.top1:.2%}, "
            f"{same} of {len(self.answers)} greedy answers the same word for word"
        )
        if not found.kl <= max_kl:
            raise RunError(
                f"the file in {dtype} is {found.kl:.4f} nats a token from the live model, more than --max-kl {max_kl}; nothing "
                "was written (a --dtype of more bits is nearer)"
            )
        return asdict(found) | {"greedy_same": same, "greedy": len(self.answers), "max_kl": max_kl, "dtype": dtype}


def hear(run: Path, scratch: Path, calibrates: bool = False) -> Heard:
    """Load a run, ask it, and let its weights go: one model is in memory at a time. scratch: a directory for its log-probs."""
    live = load_model(run)
    rows, file = held_out_rows(run, live), scratch / "live.safetensors"
    write_logprobs(live.model, rows, file)
    calibration = trained_rows(live) if calibrates else []
    return Heard(live.tokenizer, live.ends, rows, _greedy(live.model, rows, live.ends), file, calibration)


@torch.no_grad()
def _greedy(model: Any, rows: list[Tensor], ends: list[int]) -> list[list[int]]:
    """The likeliest tokens after the beginnings of rows, to a stop token or ANSWER."""
    answers = []
    for row in rows[:PROMPTS]:
        prompt, answer = row[:PROMPT].to(model.device), []
        while len(answer) < ANSWER and (not answer or answer[-1] not in ends):
            ids = torch.cat([prompt, prompt.new_tensor(answer)])[None]
            answer.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        answers.append(answer)
    return answers
