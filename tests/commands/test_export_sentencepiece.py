"""A model with a vocabulary of SentencePiece's kind, from training to a GGUF file that others read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader
from tests.models.gguf.sentencepiece import sentencepiece
from tests.models.gguf.test_gguf import made
from transformers import AutoTokenizer

import posttrain
from posttrain.commands.export.export import export_run
from posttrain.errors import UserError
from posttrain.models.gguf.spm import read_spm
from posttrain.models.gguf.texts import PLAIN

WORDS = (
    "peft=lora", "peft.r=4", "train.max_steps=2", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=4", "eval.sets=null",
    "optim.lr=0.02", "model.dtype=float32",
)  # fmt: skip


def trained(folder: Path, kind: str, family: str, tokenizer: Any) -> Path:
    made(folder / "base", family)
    tokenizer.save_pretrained(folder / "base")
    posttrain.run("sft", f"model.name={folder / 'base'}", *WORDS, f"run.dir={folder / 'mine'}")
    return folder / "mine"


@pytest.mark.parametrize(("kind", "family"), [("llama2", "mistral"), ("gemma", "gemma2"), ("phi3", "phi3")])
def test_the_whole_export(kind: str, family: str, tmp_path: Path) -> None:
    run = trained(tmp_path, kind, family, sentencepiece(kind))
    place = export_run(run, "ollama", tmp_path / "out", "f32", 1e-4)
    figures, file = json.loads((place / "export.json").read_text()), place / "mine-f32.gguf"
    assert figures["kl"] < 1e-6 and figures["greedy_same"] == figures["greedy"] == 4
    own = AutoTokenizer.from_pretrained(run / "adapter")
    spm, back = read_spm(file), AutoTokenizer.from_pretrained(place, gguf_file=file.name)
    for text in PLAIN:
        assert spm(text) == own(text, add_special_tokens=False).input_ids == back(text, add_special_tokens=False).input_ids
    fields = GGUFReader(file).fields
    assert (
        fields["tokenizer.ggml.model"].contents() == "llama" and fields["tokenizer.chat_template"].contents() == own.chat_template
    )
    assert (
        fields["tokenizer.ggml.eos_token_id"].contents() == own.eos_token_id
        and "PARAMETER stop" in (place / "Modelfile").read_text()
    )


def test_what_cannot_be_cut_alike_leaves_nothing(tmp_path: Path) -> None:
    tokenizer = sentencepiece("llama2")
    tokenizer.add_tokens(["two"])  # found after the normalizer, which llama.cpp does not have
    run = trained(tmp_path, "llama2", "mistral", tokenizer)
    with pytest.raises(UserError, match=r"export: llama\.cpp would cut '.*two.*; --to hf writes any"):
        export_run(run, "gguf", tmp_path / "out", "f32", 1e-4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "mine"]
