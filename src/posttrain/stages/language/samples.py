"""samples.json: answers to held-out prompts over a run, which its page shows side by side."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.runs.files import write_json

SAMPLES = "samples.json"
SHOWN = 8  # prompts whose answers are kept


def keep_samples(
    directory: Path,
    done: int,
    num_steps: int,
    prompts: Sequence[str],
    answers: Sequence[str],
    scores: Sequence[dict[str, float]],
    references: Sequence[str] = (),
) -> None:
    """Add the answers after `done` steps to those of earlier steps; what a run that went on has written beyond them goes."""
    path = directory / SAMPLES
    kept: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    label = {0: "before", num_steps: "after"}.get(done, f"step {done}")
    for i in range(min(SHOWN, len(prompts))):
        if i == len(kept):
            kept.append({"prompt": prompts[i], "answers": []} | ({"reference": references[i]} if references else {}))
        earlier = [answer for answer in kept[i]["answers"] if answer["step"] < done]
        new = {"step": done, "label": label, "text": answers[i]}
        new["scores"] = {name: round(value, 4) for name, value in scores[i].items()}
        kept[i]["answers"] = [*earlier, new]
    write_json(path, kept)
