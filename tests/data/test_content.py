"""What identifies the data of a run: tokens and weights that were read, and their order; nothing of the code that read them."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from posttrain.config.compose import compose_run
from posttrain.config.schema import DataConfig
from posttrain.data import prepare as preparing
from posttrain.data.chat.encoder import Encoder
from posttrain.data.example_store import Store, load
from posttrain.data.examples import Examples, build
from posttrain.data.mixture import read_mixture
from posttrain.data.overlaps import rows_of
from posttrain.models.builtin import tiny_tokenizer
from posttrain.stages.spec import row_uses

ROWS = [([1, 2, 3], [0.0, 1.0, 1.0], 1), ([4, 5], [0.0, 0.5], 2), ([6, 7, 8, 9], [0.0, 1.0, 1.0, 1.0], 3)]


def content(directory: Path, *pieces: Examples) -> str:
    out = Store(directory)
    for piece in pieces:
        out.add("train", piece, rows_of([]))
    out.close({})
    return load(directory).content


def test_it_names_tokens_weights_and_order(tmp_path: Path) -> None:
    whole = content(tmp_path / "whole", build(ROWS))
    assert whole.startswith("sha256:") and len(whole) == 39
    assert content(tmp_path / "pieces", build(ROWS[:1]), build(ROWS[1:])) == whole
    moved = [(tokens, weights, row + 7) for tokens, weights, row in ROWS]
    assert content(tmp_path / "moved", build(moved)) == whole, "a blank line before them changes nothing that is trained on"
    examples = build(ROWS)
    others = {
        "order": build(ROWS[::-1]),
        "tokens": build([([1, 2, 4], [0.0, 1.0, 1.0], 1), *ROWS[1:]]),
        "weights": build([([1, 2, 3], [0.0, 1.0, 0.9], 1), *ROWS[1:]]),
        "cuts": build([([1, 2], [0.0, 1.0], 1), ([3, 4, 5], [1.0, 0.0, 0.5], 2), ROWS[2]]),
        "units": replace(examples, units=np.array([0, 1, 3])),
        "margins": replace(examples, margins=np.ones(3, np.float32)),
        "fewer": build(ROWS[:2]),
    }
    found = {name: content(tmp_path / name, each) for name, each in others.items()}
    assert len({whole, *found.values()}) == 1 + len(others)


def test_other_code_that_reads_the_same_is_no_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "rows.jsonl"

    def read(texts: list[str]) -> tuple[str, str]:
        file.write_text("".join(json.dumps({"prompt": text, "completion": f"{text}!"}) + "\n" for text in texts))
        config = compose_run("sft", ["model=tiny", f"data.path={file}", "data.eval_share=0"])
        data = DataConfig.model_validate(config["data"])
        mixture = read_mixture(data, row_uses()["sft"], Encoder(tiny_tokenizer()), 64, tmp_path / "cache")
        return mixture.key, mixture.content

    first = read(["one", "two", "three"])
    assert read(["one", "three", "two"])[1] != first[1]
    monkeypatch.setattr(preparing, "_key", lambda *_: "the key of another version's code")
    key, again = read(["one", "two", "three"])
    assert key != first[0] and again == first[1]
