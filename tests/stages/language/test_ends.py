"""What a run saves stops where its answers end, by plain transformers too: though the base's eos ends no turn."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import posttrain
from posttrain.commands.chat import Conversation
from posttrain.commands.merge import merge_run
from posttrain.models.hub import resolve
from posttrain.models.language.loading import load_model
from posttrain.models.language.tokenizer import load_tokenizer, make_encoder, write_ends

ROW = {"messages": [{"role": "user", "content": "say it"}, {"role": "assistant", "content": "the list"}]}
ASKED = [{"role": "user", "content": "say it"}]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """model=tiny whose eos is <|endoftext|>, while its template ends turns with <|im_end|>; and one row beside it."""
    folder = tmp_path_factory.mktemp("base")
    shutil.copytree(resolve("tiny", None).directory, folder / "base")
    tokenizer: Any = load_tokenizer("tiny", None, None, None)
    tokenizer.eos_token = "<|endoftext|>"
    tokenizer.save_pretrained(folder / "base")
    kept = {"eos_token_id": tokenizer.eos_token_id, "repetition_penalty": 1.0, "renormalize_logits": True}
    (folder / "base" / "generation_config.json").write_text(json.dumps(kept))
    (folder / "rows.jsonl").write_text((json.dumps(ROW) + "\n") * 40)
    return folder


@pytest.fixture(scope="module")
def runs(base: Path) -> dict[str, Path]:
    words = ["train.batch_size=4", "eval.sets=null", "data.eval_share=0", "model.dtype=float32"]
    words += [f"data.path={base}/rows.jsonl", "data.eval_rows=0"]
    full = [f"model.name={base}/base", "train.max_steps=40", "optim.lr=0.02"]
    posttrain.run("sft", *words, *full, f"run.dir={base}/full")
    shutil.copytree(base / "full" / "model", base / "taught")  # it knows the answer, and says nothing of its end
    shutil.copy(base / "base" / "generation_config.json", base / "taught")
    lora = ["+peft=lora", "peft.r=2", f"model.name={base}/taught", "train.max_steps=2", "optim.lr=0.001"]
    posttrain.run("sft", *words, *lora, f"run.dir={base}/lora")
    merge_run(base / "lora", base / "merged", 1.0)
    return {name: base / name for name in ("full", "lora", "merged")}


def ids_of(folder: Path) -> list[int]:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])


def answer(model: Any, folder: Path, **how: Any) -> str:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    text = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    inputs = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    out = model.generate(**inputs, do_sample=False, max_new_tokens=24, **how)
    return tokenizer.decode(out[0, inputs["input_ids"].shape[1] :])


def test_full_training_and_a_merge_stop_in_plain_generate(runs: dict[str, Path]) -> None:
    for folder in (runs["full"] / "model", runs["merged"]):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert saved["eos_token_id"] == ids_of(folder)
        assert saved["renormalize_logits"] is True  # the base's other settings stay
        assert answer(AutoModelForCausalLM.from_pretrained(folder), folder) == "the list<|im_end|>"


def test_an_adapter_has_it_beside_it(runs: dict[str, Path], base: Path) -> None:
    folder = runs["lora"] / "adapter"
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base / "taught"), folder)
    assert answer(model, folder, generation_config=GenerationConfig.from_pretrained(folder)) == "the list<|im_end|>"
    assert answer(model, folder) != "the list<|im_end|>"  # of the base's own


def test_chat_stops_at_the_same_token(runs: dict[str, Path]) -> None:
    for run in (runs["lora"], runs["full"], runs["merged"]):
        live = load_model(run)
        assert live.ends == ids_of(run / ("adapter" if run.name == "lora" else "model" if run.name == "full" else ""))
        assert Conversation(live, 0.0, 1.0, 24).answer("say it") == "the list"


def test_what_is_saved_reads_rows_as_its_base_does(runs: dict[str, Path], base: Path) -> None:
    """So that a reward model of the base goes with a policy of the run."""
    encoders = [make_encoder(load_tokenizer(str(f), None, None, None), str(f), None) for f in (base / "base", runs["merged"])]
    assert encoders[0].identity == encoders[1].identity
    assert encoders[0].end_tokens() == encoders[1].end_tokens()


def test_without_a_generation_config_the_configs_ids_are_kept(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 4, "pad_token_id": 0, "eos_token_id": 2}))
    write_ends(tmp_path, [7, 2])
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {
        "bos_token_id": 4,
        "pad_token_id": 0,
        "eos_token_id": [7, 2],
    }
