"""`optim.lr=auto`: the rule's numbers by hand, and a run that has the bits of one with its number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.stages.language.learning_rate import auto_rate


def found(folder: Path, config: dict[str, Any], *words: str, steps: int = 1000, stage: str = "sft") -> tuple[float, str]:
    (folder / "config.json").write_text(json.dumps(config))
    cfg: Any = typed_config(compose_run(stage, ["model=tiny", "optim.lr=auto", *words]))
    rate = auto_rate(cfg, steps, 2, folder)
    return rate.value, rate.line


BATCH = ("train.batch_size=16", "train.grad_accum=4")  # times two processes: 128


@pytest.mark.parametrize(
    ("config", "words", "steps", "want"),
    [
        # the rates of the cookbook: 5e-5, ten times that, at width 2000; 5e-4 (2000 / 4096)**0.781 of Llama 8B
        ({"hidden_size": 2000, "model_type": "llama"}, (), 1000, 5e-5),
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=lora",), 1000, 5e-4),
        ({"hidden_size": 4096, "model_type": "llama"}, ("+peft=lora",), 1000, 2.86e-4),
        ({"hidden_size": 4096, "model_type": "qwen3"}, ("+peft=lora",), 1000, 4.73e-4),
        ({"text_config": {"hidden_size": 576, "model_type": "llama"}}, ("+peft=lora",), 1000, 1.32e-3),
        # 15 in place of 10 times full training in fewer than 100 steps; full training itself is as it was
        ({"n_embd": 2000, "model_type": "gpt2"}, ("+peft=lora",), 99, 7.5e-4),
        ({"n_embd": 2000, "model_type": "gpt2"}, ("+peft=lora",), 100, 5e-4),
        ({"n_embd": 2000, "model_type": "gpt2"}, (), 99, 5e-5),
        # by alpha / r every rank has one rate; half of alpha takes twice the rate; alpha / sqrt(r) is r**0.5 times as much
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=lora", "peft.r=256"), 1000, 5e-4),
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=dora", "peft.alpha=16"), 1000, 1e-3),
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=rslora", "peft.r=64", "peft.alpha=16"), 1000, 1.25e-4),
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=pissa",), 10, 2.5e-4),
        # what a stage's full training is slower by, so is this
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=lora", "full_lr=5e-7"), 1000, 1.25e-5),
        # a 16th of the batch takes half of the rate
        ({"hidden_size": 2000, "model_type": "llama"}, ("+peft=lora", "train.grad_accum=1", "train.batch_size=4"), 1000, 2.5e-4),
    ],
)  # fmt: skip
def test_numbers_by_hand(tmp_path: Path, config: dict[str, Any], words: tuple[str, ...], steps: int, want: float) -> None:
    assert found(tmp_path, config, *BATCH, *words, steps=steps)[0] == pytest.approx(want, rel=1e-9)


def test_the_line_has_every_factor(tmp_path: Path) -> None:
    _, line = found(tmp_path, {"hidden_size": 1000, "model_type": "llama"}, "+peft=lora", "train.batch_size=4", steps=10)
    assert line.startswith(
        "optim.lr=auto: 0.000766 = 5e-05 (full training at width 2000) x 10 (lora) x 1.5 (fewer than 100 steps) "
        "x 1.72 (width 1000, as llama) x 0.595 (batch 16); "
    )


def test_what_has_no_width(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"optim.lr: auto goes by the model's width, which .*config.json does not say"):
        found(tmp_path, {"model_type": "llama"})


@pytest.mark.slow
def test_a_run_is_that_of_its_number(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=tiny", "+peft=lora", "train.max_steps=2", "train.batch_size=2", "train.grad_accum=1", "data.max_rows=10",
             "data.eval_rows=2", "eval.rows=2"]  # fmt: skip
    auto = posttrain.run("sft", *words, "optim.lr=auto", f"run.dir={tmp_path / 'auto'}")
    said = capsys.readouterr().out
    rate = auto["identity"]["optim.lr"]
    assert (
        rate == float(f"{5e-5 * 10 * 1.5 * (2000 / 128) ** 0.781 * (2 / 128) ** 0.25:.3g}") and f"optim.lr=auto: {rate:g}" in said
    )
    own = posttrain.run("sft", *words, f"optim.lr={rate}", f"run.dir={tmp_path / 'own'}")
    assert auto["metrics"] == own["metrics"]
    file = "adapter/adapter_model.safetensors"
    assert auto["files"][file] == own["files"][file]


def test_pictures_have_no_rule(tmp_path: Path) -> None:
    from posttrain.stages.stage import _with_rate
    from posttrain.stages.steps import Prepared

    cfg: Any = typed_config(compose_run("sft", ["model=tiny", "optim.lr=auto"]))
    order: Any = None
    with pytest.raises(UserError, match=r"optim\.lr: auto is a rule of language models"):
        _with_rate(cfg, Prepared(None, {}, order, [], str))
