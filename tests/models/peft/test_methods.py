"""Every method: how many numbers it trains, that it starts as the model it was given, that plain peft loads what it leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import posttrain
from posttrain.config.compose import compose_run
from posttrain.config.interfaces import METHODS as METHOD_FILES
from posttrain.config.interfaces import QUANTIZERS
from posttrain.config.paths import root
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.counting import count_parameters
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.export import export_adapter
from posttrain.models.peft.kinds import kind_of
from posttrain.models.peft.methods.adalora import RankAllocator, final_ranks
from posttrain.models.quantization import keep_as_quantized, quantization

IDS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
V, D, FF, LAYERS, KV = 31, 64, 96, 2, 32
LLAMA: dict[str, Any] = {
    "vocab_size": V, "hidden_size": D, "intermediate_size": FF, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
# in and out of the linear layers of one block
SHAPES = {
    "llama": [(D, D), (D, KV), (D, KV), (D, D), (D, FF), (D, FF), (FF, D)],
    "gpt2": [(D, 3 * D), (D, D), (D, 4 * D), (4 * D, D)],
    "qwen": [(D, 96), (D, 48), (D, 48), (96, D), (D, FF), (D, FF), (FF, D)],
}
KEYS = {"llama": KV, "gpt2": D, "qwen": 48}  # width of all keys of a layer
METHODS = ["lora", "rslora", "dora", "pissa", "loraplus", "adalora", "vera", "adapter", "prefix", "ptuning", "prompt"]
SMALL = {"adalora": ["peft.r=4", "peft.init_r=6"], "vera": ["peft.r=16"], "adapter": ["peft.r=8"], "prefix": ["peft.length=5"],
         "ptuning": ["peft.length=5", "peft.hidden=24"], "prompt": ["peft.length=5"]}  # fmt: skip


def make(shape: str) -> Any:
    torch.manual_seed(0)
    if shape == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=V, n_embd=D, n_layer=LAYERS, n_head=4, n_positions=64))
    if shape == "qwen":
        return Qwen3ForCausalLM(Qwen3Config(**{**LLAMA, "head_dim": 24}))
    return LlamaForCausalLM(LlamaConfig(**LLAMA))


def method(name: str, *more: str) -> Any:
    words = [f"peft={name}", *(SMALL.get(name, ["peft.r=4"])), *more]
    return typed_config(compose_run("sft", words)).peft


def expected(name: str, shape: str) -> int:
    """SPEC's closed forms, summed over the layers."""
    matrices = SHAPES[shape] * LAYERS
    if name in ("lora", "rslora", "pissa", "loraplus"):
        return sum(4 * (a + b) for a, b in matrices)
    if name == "dora":
        return sum(4 * (a + b) + b for a, b in matrices)
    if name == "adalora":
        return sum(6 * (a + b) + 6 for a, b in matrices)
    if name == "vera":
        return sum(16 + b for _, b in matrices)
    if name == "adapter":
        return LAYERS * 2 * (2 * D * 8 + D + 8)
    if name == "prefix":
        return 2 * 5 * KEYS[shape] * LAYERS
    if name == "ptuning":
        return 5 * D + (D * 24 + 24) + (24 * 24 + 24) + (24 * D + D)
    return 5 * D


# peft shapes a prefix by hidden_size / heads, which is not Qwen3's head_dim
CASES = [(n, s) for n in METHODS for s in SHAPES if (n, s) != ("prefix", "qwen")]


@pytest.mark.parametrize(("name", "shape"), CASES)
def test_trained_numbers_are_the_closed_form(name: str, shape: str) -> None:
    total = count_parameters(make(shape))[1]
    trained, with_frozen = count_parameters(add_method(make(shape), method(name), 10))
    assert trained == expected(name, shape)
    if name not in ("adalora", "vera"):  # these have frozen numbers of their own
        assert with_frozen == total + trained


@pytest.mark.parametrize(("shape", "block"), [("llama", None), ("qwen", None), ("gpt2", None)])
def test_head_and_partial(shape: str, block: None) -> None:
    head = V * D
    assert count_parameters(add_method(make(shape), method_of("head")))[0] == head
    model = make(shape)
    one = sum(p.numel() for p in (model.transformer.h if shape == "gpt2" else model.model.layers)[-1].parameters())
    norm = 2 * D if shape == "gpt2" else D
    for layers, count in (("1", 1), ("0.5", 1), ("2", 2)):
        assert (
            count_parameters(add_method(make(shape), method_of("partial", f"peft.layers={layers}")))[0]
            == count * one + norm + head
        )


def method_of(name: str, *more: str) -> Any:
    return typed_config(compose_run("sft", [f"peft={name}", *more])).peft


@pytest.mark.parametrize(
    ("side", "r", "full", "lora", "times"), [(512, 8, 262_144, 8_192, 32), (4096, 8, 16_777_216, 65_536, 256)]
)
def test_reference_counts_of_one_matrix(side: int, r: int, full: int, lora: int, times: int) -> None:
    with torch.device("meta"):
        shape = {**LLAMA, "hidden_size": side, "num_hidden_layers": 1, "num_key_value_heads": 4, "num_attention_heads": 4}
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    assert model.model.layers[0].self_attn.q_proj.weight.numel() == full
    trained = count_parameters(add_method(model, method_of("lora", f"peft.r={r}", "peft.targets=[q_proj]")))[0]
    assert trained == lora and full // trained == times
    if side == 512:  # three tasks on one base
        assert (3 * full, full + 3 * trained) == (786_432, 286_720)


def test_a_tied_head_is_untied_and_the_embeddings_stay() -> None:
    model: Any = LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True))
    before = model.get_input_embeddings().weight.detach().clone()
    add_method(model, method_of("head"))
    model(IDS, labels=IDS).loss.backward()
    with torch.no_grad():
        model.lm_head.weight -= model.lm_head.weight.grad
    assert torch.equal(model.get_input_embeddings().weight, before)
    assert not torch.equal(model.lm_head.weight, before)


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits[:, -IDS.shape[1] :]  # soft tokens come before


def trained(model: Any, seed: int = 1, by: float = 0.05) -> None:
    """Stands for training: every trained number moves."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += torch.randn(p.shape, generator=generator) * by


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    return folder


def load(base: Path, quant: str = "none") -> Any:
    named = {
        "nf4": {"method": "nf4", "double_quant": True, "compute_dtype": "float32"},
        "int8": {"method": "int8", "threshold": 6.0},
    }
    config = quantization(named.get(quant, {"method": "none"}), "cpu")
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, quantization_config=config)
    keep_as_quantized(model)
    return model


REFUSED = [("pissa", "nf4"), ("pissa", "int8"), ("dora", "int8")]
ON_QUANTIZED = [(name, quant) for quant in ("nf4", "int8") for name in METHODS if (name, quant) not in REFUSED]


@pytest.mark.parametrize(("name", "quant"), [*((name, "none") for name in METHODS), *ON_QUANTIZED])
def test_what_is_written_is_what_was_trained(base: Path, name: str, quant: str, tmp_path: Path) -> None:
    """Unchanged at the start (but for soft tokens), another function after training, the same one in plain peft."""
    bare = logits(load(base, quant))
    model: Any = add_method(load(base, quant), method(name), 10)
    if name not in ("prefix", "ptuning", "prompt"):
        torch.testing.assert_close(logits(model), bare, rtol=0, atol=2e-5 if name in ("pissa", "dora") else 1e-6)
    trained(model)
    live = logits(model)
    assert (live - bare).abs().max() > 1e-4
    export_adapter(model, tmp_path, str(base))
    targets = json.loads((tmp_path / "adapter_config.json").read_text()).get("target_modules")
    assert not isinstance(targets, list) or targets == sorted(targets)  # peft's own order is another in every process
    again = PeftModel.from_pretrained(load(base, quant), str(tmp_path))
    assert again.peft_config["default"].base_model_name_or_path == str(base)
    torch.testing.assert_close(logits(again), live, rtol=0, atol=3e-5)


@pytest.mark.parametrize(("name", "quant"), [*REFUSED, ("none", "nf4"), ("head", "int8"), ("partial", "nf4")])
def test_what_cannot_go_on_a_quantized_base_is_refused(name: str, quant: str) -> None:
    with pytest.raises(UserError, match=f"quant={quant} cannot be trained"):
        compose_run("sft", [f"peft={name}", f"quant={quant}"])


def test_loraplus_has_b_learn_faster() -> None:
    plus = method("loraplus", "peft.lr_ratio=16")
    model = add_method(make("llama"), plus)
    ratios = {name.split(".lora_")[1][0]: plus.rate_of(name) for name, p in model.named_parameters() if p.requires_grad}
    assert ratios == {"A": 1.0, "B": 16.0}


def test_adalora_keeps_r_singular_values_on_average(base: Path, tmp_path: Path) -> None:
    """Of 6 in each of the 14 layers 4 on average are left; what is exported has just those ranks."""
    model: Any = add_method(load(base), method("adalora", "peft.start=0.1", "peft.end=0.3"), 10)
    schedule = RankAllocator(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for done in range(1, 11):
        (model(IDS, labels=IDS).loss + schedule.penalty()).backward()
        optimizer.step()
        schedule.after_step(done)
        optimizer.zero_grad()
    ranks = final_ranks(model)
    assert len(ranks) == 14 and sum(ranks.values()) == 4 * 14 and len(set(ranks.values())) > 1
    export_adapter(model, tmp_path, str(base))
    again: Any = PeftModel.from_pretrained(load(base), str(tmp_path))
    for name, rank in ranks.items():
        layer = again.get_base_model().get_submodule(name)
        assert (layer.lora_A["default"].weight.shape[0] if hasattr(layer, "lora_A") else 0) == rank
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("end", "steps", "last"),  # the step in which the last ranks go: steps - int(end * steps)
    [(0.3, 1, 1), (0.0, 1, 1), (0.5, 2, 1), (0.7, 3, 1), (0.3, 2, None), (0.5, 3, None), (0.7, 5, None), (0.0, 2, None)],
)
def test_adalora_needs_a_step_to_weigh_ranks_in(end: float, steps: int, last: int | None) -> None:
    chosen = method("adalora", "peft.start=0", f"peft.end={end}")
    if last is None:
        chosen.check_steps(steps)
        return
    with pytest.raises(UserError, match=rf"train\.max_steps: of {steps} steps adalora drops its last ranks in step {last},"):
        chosen.check_steps(steps)


def test_adalora_of_too_few_steps_is_refused_before_anything_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["model=tiny", "peft=adalora", "train.batch_size=2", "data.max_rows=20", "data.eval_rows=4", "eval.sets=null"]
    done = posttrain.run("sft", *words, "train.max_steps=2", f"run.dir={tmp_path}/two")
    assert len(done["peft"]["ranks"]) > 0 and done["steps"] == 2
    monkeypatch.setattr("posttrain.stages.language.build.load_causal", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=r"train\.max_steps: of 1 steps adalora"):
        posttrain.run("sft", *words, "train.max_steps=1", f"run.dir={tmp_path}/one")


def test_every_file_is_the_method_that_it_is_called() -> None:
    """By the name of the file, of its config, and of its YAML."""
    for registry in (METHOD_FILES, QUANTIZERS):
        for name, found in registry.all().items():
            assert get_args(found.model_fields["method"].annotation) == (name,)
    assert set(METHOD_FILES.names()) <= {file.stem for file in (root("configs") / "peft").glob("*.yaml")}
    assert set(QUANTIZERS.names()) == {file.stem for file in (root("configs") / "quant").glob("*.yaml")}


def test_what_an_adapter_says_of_its_kind_is_what_its_method_leaves(base: Path, tmp_path: Path) -> None:
    for name in METHODS:
        model: Any = add_method(load(base), method(name), 10)
        trained(model)
        export_adapter(model, tmp_path / name, str(base))
        config = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert kind_of(config) is method(name).saves


def test_adalora_penalty_is_pefts(base: Path) -> None:
    model: Any = add_method(load(base), method("adalora", "peft.orthogonality=0.7"), 10)
    trained(model)
    plain = model.get_base_model()(IDS, labels=IDS).loss
    torch.testing.assert_close(model(IDS, labels=IDS).loss - plain, RankAllocator(model).penalty(), rtol=0, atol=1e-5)
