"""Runs whose adapters begin by the run's own rows, or by what quantizing has lost: measured at the start, stopped, merged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.commands.merge import merge_run
from posttrain.commands.plan.plan import make_plan
from posttrain.errors import Stopped, UserError
from posttrain.runs.files import sha256

WORDS = (
    *("model=tiny", "peft=lora", "peft.r=4", "train.max_steps=4", "train.batch_size=4", "train.grad_accum=1", "data.max_rows=40"),
    *("data.eval_rows=4", "eval.sets=null", "train.max_length=64", "optim.lr=1e-2", "train.save_steps=2", "peft.init_rows=12"),
)


def run(directory: Path, *words: str) -> dict[str, Any]:
    return posttrain.run("sft", *WORDS, *words, f"run.dir={directory}")


@pytest.mark.slow
@pytest.mark.parametrize("words", [("eva",), ("corda",), ("lora_ga",), ("loftq", "quant=nf4")], ids=lambda words: words[0])
def test_a_run_is_stopped_goes_on_to_the_bit_and_is_merged(
    words: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    init, *more = words
    figures = run(tmp_path / "straight", f"peft.init={init}", *more)["metrics"]
    assert figures["eval/loss"] < figures["eval/loss_before"]
    with pytest.raises(Stopped):
        run(tmp_path / "stopped", f"peft.init={init}", "run.stop_after=2", *more)
    monkeypatch.setenv("POSTTRAIN_CACHE", str(tmp_path / "cache"))  # the first values are worked out anew
    run(tmp_path / "stopped", f"peft.init={init}", *more)
    files = [tmp_path / name / "adapter" / "adapter_model.safetensors" for name in ("straight", "stopped")]
    assert sha256(files[0]) == sha256(files[1])
    kept = merge_run(tmp_path / "straight", tmp_path / "merged", 1e-4)["kept"]
    assert kept == ("dequantized" if init == "loftq" else "full")


@pytest.mark.slow
def test_over_an_adapter_it_is_refused_and_the_merged_base_is_what_it_begins_by(tmp_path: Path) -> None:
    run(tmp_path / "first")
    for mode in ("stack", "continue"):
        with pytest.raises(
            UserError, match=r"^chain.mode: what is trained by lora with peft.init=eva begins by what the bare base"
        ):
            run(tmp_path / mode, "peft.init=eva", f"init={tmp_path / 'first'}", f"chain.mode={mode}")
    made = run(tmp_path / "second", "peft.init=eva", f"init={tmp_path / 'first'}")
    first = json.loads((tmp_path / "first" / "manifest.json").read_text())
    assert made["chain"] == "merge"
    assert made["metrics"]["eval/loss_before"] == pytest.approx(first["metrics"]["eval/loss"], abs=1e-3)


def test_a_model_that_reads_no_packs_is_refused_before_its_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stages.language.build.load_causal", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        UserError, match=r"^peft.init: what is trained by lora with peft.init=corda .*, and the model reads one document a"
    ):
        run(tmp_path / "run", "peft.init=corda", "train.packing=false")


@pytest.mark.slow
def test_a_plan_says_what_it_cannot_know() -> None:
    said = make_plan("sft", ["model=tiny", "peft=lora", "peft.init=lora_ga", "train.max_steps=1"])["assumptions"]
    assert "peft.init=lora_ga: before the first step a matrix of every layer that gets an adapter is held" in " ".join(said)
    assert "peft.init" not in " ".join(make_plan("sft", ["model=tiny", "peft=lora", "train.max_steps=1"])["assumptions"])
