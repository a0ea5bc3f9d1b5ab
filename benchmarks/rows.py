"""Ragged documents, chat and preference rows like Alpaca's, cut from the language reference that every Python carries."""

from __future__ import annotations

import json
import random
from pathlib import Path

from posttrain.data.sources.builtin.sets import builtin_rows


def write_rows(directory: Path, count: int, seed: int = 0, scale: float = 1.0) -> dict[str, Path]:
    """A file of `count` rows for each stage.

    Answers' lengths are log-normal as Alpaca's are: median about 130 words, a tail to 400; questions 10 to 60 words. Documents
    are as long as question and answer. scale: of all lengths.
    """
    words = " ".join(row["text"] for row in builtin_rows("reference", "train")).split()
    rng = random.Random(seed)

    def passage(length: int) -> str:
        length = max(1, round(scale * length))
        start = rng.randrange(len(words) - length)
        return " ".join(words[start : start + length])

    def length() -> int:
        return max(8, min(400, int(rng.lognormvariate(4.87, 0.7))))

    directory.mkdir(parents=True, exist_ok=True)
    paths = {stage: directory / f"{stage}.jsonl" for stage in ("cpt", "sft", "dpo", "rm", "ppo")}
    with paths["sft"].open("w") as sft, paths["dpo"].open("w") as dpo, paths["cpt"].open("w") as cpt:
        for _ in range(count):
            question = {"role": "user", "content": passage(rng.randint(10, 60))}
            answers = [[{"role": "assistant", "content": passage(length())}] for _ in range(2)]
            sft.write(json.dumps({"messages": [question, *answers[0]]}) + "\n")
            dpo.write(json.dumps({"prompt": [question], "chosen": answers[0], "rejected": answers[1]}) + "\n")
            cpt.write(json.dumps({"text": question["content"] + " " + answers[0][0]["content"]}) + "\n")
    for stage, same in (("rm", "dpo"), ("ppo", "sft")):
        paths[stage].write_text(paths[same].read_text())
    return paths
