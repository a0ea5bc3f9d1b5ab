"""What is no causal model, and what a causal one cannot have, is refused before the data is read, by plans in the same words."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

import posttrain
from posttrain.commands.plan.plan import make_plan
from posttrain.errors import UserError
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.tokenizer import load_tokenizer

SMALL: dict[str, Any] = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
OTHERS: dict[str, tuple[Any, dict[str, Any], str]] = {
    "t5": (transformers.T5Config, {"d_model": 32}, "an encoder-decoder, which writes after another text that it has read whole"),
    "bart": (transformers.BartConfig, {"d_model": 32}, "an encoder-decoder, which writes after another text that it has read"),
    "bert": (transformers.BertConfig, SMALL, "an encoder, whose every token sees those after it"),
    "modernbert": (transformers.ModernBertConfig, SMALL, "an encoder, whose every token sees those after it"),
}


def directory(config: Any, at: Path, weights: bool = False) -> str:
    tokenizer = load_tokenizer("tiny", None, None, None)
    config.vocab_size = len(tokenizer)
    if weights:
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(at)
    else:
        config.save_pretrained(at)
        (at / "model.safetensors").write_bytes(b"")
    tokenizer.save_pretrained(at)
    return f"model.name={at}"


@pytest.fixture
def nothing_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("posttrain.stages.language.prepare.read_mixture", lambda *_: pytest.fail("the data was read"))
    monkeypatch.setattr("posttrain.stages.language.build.load_causal", lambda *_: pytest.fail("a model was loaded"))


@pytest.mark.parametrize("name", OTHERS)
def test_what_is_not_causal_is_refused_in_a_true_line(name: str, tmp_path: Path, nothing_is_read: None) -> None:
    kind, settings, what = OTHERS[name]
    words = [directory(kind(**settings), tmp_path / "base"), "eval.sets=null", "train.max_steps=1"]
    found = []
    for call in (lambda: posttrain.run("sft", *words, f"run.dir={tmp_path / 'run'}"), lambda: make_plan("sft", words)):
        with pytest.raises(UserError, match=rf"^model\.name: '.*' \({name}\) is {what}.*; give a causal language model") as error:
            call()
        found.append(str(error.value))
    assert found[0] == found[1]


def test_packing_and_attention_that_cannot_be_had_are_refused_before_the_data(tmp_path: Path, nothing_is_read: None) -> None:
    mamba = directory(transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1), tmp_path / "mamba")
    gemma = directory(transformers.Gemma2Config(**SMALL, head_dim=16, num_key_value_heads=2), tmp_path / "gemma2")
    cases = (
        ([mamba, "train.packing=true"], r"^train\.packing: MambaForCausalLM cannot be packed: "),
        ([gemma, "model.attention=documents"], r"^model\.attention: Gemma2ForCausalLM cannot be packed by documents: .*softcap"),
        ([gemma, "+peft=lora", "peft.targets=[k_prj]"], r"^peft\.targets: "),
    )
    for number, (words, line) in enumerate(cases):
        with pytest.raises(UserError, match=line):
            posttrain.run("sft", *words, "eval.sets=null", "train.max_steps=1", f"run.dir={tmp_path / str(number)}")


def test_a_plan_says_how_packs_will_be_read(tmp_path: Path) -> None:
    """Also of models whose mask transformers makes from values, which the meta device has not (BLOOM)."""
    words = ["eval.sets=null", "train.max_steps=1", "data.max_rows=12"]
    mamba = directory(transformers.MambaConfig(hidden_size=16, state_size=4, num_hidden_layers=1), tmp_path / "mamba")
    bloom = directory(transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2), tmp_path / "bloom")
    for model in (mamba, bloom):
        assert any(
            line.startswith("the model reads one document a row") for line in make_plan("sft", [model, *words])["assumptions"]
        )
    assert not any("one document a row" in line for line in make_plan("sft", ["model=tiny", *words])["assumptions"])


MOE: dict[str, Any] = {
    "head_dim": 16,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "num_key_value_heads": 2,
}


@pytest.mark.parametrize(
    ("config", "way"),
    [
        (transformers.DiffLlamaConfig(**SMALL, num_key_value_heads=2), "rows"),  # whose mask is made of values
        (transformers.BloomConfig(hidden_size=32, n_layer=2, n_head=2), "rows"),
        (transformers.Qwen3MoeConfig(**SMALL, **MOE), "packed"),  # whose grouped product is not there in float32
    ],
)
def test_what_the_meta_device_cannot_run_is_no_obstacle(config: Any, way: str) -> None:
    from posttrain.models.language.activations import model_of_shapes
    from posttrain.models.peft.methods.none import Full

    model = model_of_shapes(config, torch.float32, Full(method="none", lr_factor=1.0))
    with torch.device("meta"):
        assert PackedLM(model, "auto", "reference").reading.way == way


def test_a_model_whose_tokens_see_later_ones_is_refused_at_load() -> None:
    """The config of an encoder in a causal class, as nothing but its numbers can tell."""
    torch.manual_seed(0)
    model: Any = transformers.BertLMHeadModel(transformers.BertConfig(**SMALL, vocab_size=61, is_decoder=False))
    for parameter in model.parameters():
        parameter.data += 0.2 * torch.randn_like(parameter)
    with pytest.raises(UserError, match=r"^model\.name: BertLMHeadModel is not causal: what it says of a token depends on those"):
        PackedLM(model)


REWARD = "reward.function=length"
NOTHING = "optim.lr_groups: nothing that is trained is of "


def test_a_group_of_rates_that_nothing_is_of_is_refused_before_the_data(tmp_path: Path, nothing_is_read: None) -> None:
    asked = ["model=tiny", "peft=lora", "eval.sets=null", "train.max_steps=1", "optim.lr_groups={down_prj: 1e-4}"]
    for call in (lambda: posttrain.run("sft", *asked, f"run.dir={tmp_path}"), lambda: make_plan("sft", asked)):
        with pytest.raises(UserError) as error:
            call()
        assert str(error.value).startswith(f"{NOTHING}'down_prj' - did you mean 'down_proj'?; a tied head")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words", "group", "near"), [("rm", (), "scores", "score"), ("ppo", (REWARD,), "polcy", "policy")]
)
def test_so_it_is_where_a_stage_trains_more_than_the_model(stage: str, words: tuple[str, ...], group: str, near: str) -> None:
    with pytest.raises(UserError) as error:
        make_plan(stage, ["model=tiny", "peft=lora", *words, "train.max_steps=1", f"optim.lr_groups={{{group}: 1e-4}}"])
    assert str(error.value).startswith(f"{NOTHING}'{group}' - did you mean '{near}'?")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stage", "words", "group"),
    [
        ("rm", ("peft=lora",), "score"),
        ("ppo", ("peft=lora", REWARD), r"lora_A\.value"),
        ("ppo", ("peft=none", REWARD), "scorers"),
        ("sft", ("peft=lora", "model.add_tokens=[zebra]"), "token_adapter"),
    ],
)
def test_a_group_that_something_is_of_is_not(stage: str, words: tuple[str, ...], group: str) -> None:
    make_plan(stage, ["model=tiny", *words, "train.max_steps=1", f"optim.lr_groups={{{group}: 1e-4}}"])
