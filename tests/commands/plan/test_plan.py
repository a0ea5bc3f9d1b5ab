"""The plan against what really is allocated: exactly, where it can be counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.batch import Segment
from posttrain.commands.plan.memory import adamw_bytes
from posttrain.commands.plan.plan import make_plan, parse_memory
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.activations import activations, model_of_shapes
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.pretrained import load_causal
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.peft.attach import add_method
from posttrain.models.quantization import quantization
from posttrain.models.quantization.nf4 import nf4_bytes

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2,
}  # fmt: skip
WORDS = ["train.max_steps=4", "train.batch_size=2", "data.max_rows=40"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose weights are there, to compare with; the plan itself only reads config and tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SHAPE)).save_pretrained(folder)
    load_tokenizer("tiny", None, None, None).save_pretrained(folder)
    return folder


def really(directory: Path, words: list[str]) -> dict[str, int]:
    """Bytes of a real model, its gradients and its optimizer after one step."""
    cfg = typed_config(compose_run("sft", [f"model.name={directory}", *words]))
    dtype = "float32" if cfg.peft.output == "model" else "bfloat16"
    model: Any = load_causal(str(directory), None, dtype, "cpu", None, quantization(cfg.quant.model_dump(), "cpu"))
    model = add_method(model, cfg.peft, 10)
    found = dict.fromkeys(("weights", "quantized weights", "quantization constants", "adapters", "gradients", "optimizer"), 0)
    ids = torch.arange(8)[None]
    model(ids, labels=ids).loss.backward()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    optimizer.step()
    for name, p in model.named_parameters():
        state = getattr(p, "quant_state", None)
        if state is not None:
            found["quantized weights"] += p.nbytes
            found["quantization constants"] += state.absmax.nbytes + state.state2.absmax.nbytes
        else:
            found["adapters" if "lora_" in name else "weights"] += p.nbytes
        if p.requires_grad and p.grad is not None:
            found["gradients"] += p.grad.nbytes
            found["optimizer"] += sum(optimizer.state[p][slot].nbytes for slot in ("exp_avg", "exp_avg_sq"))
    return {part: size for part, size in found.items() if size}


@pytest.mark.parametrize(
    "method", [[], ["peft=lora", "peft.r=4"], ["peft=qlora", "peft.r=4"], ["peft=lora", "peft.targets=[q_proj]"]]
)
def test_what_can_be_counted_is_exact(directory: Path, method: list[str]) -> None:
    plan = make_plan("sft", [f"model.name={directory}", *WORDS, *method])
    expected = really(directory, method)
    assert {part: plan["memory"][part] for part in expected} == expected
    assert plan["steps"] == 4 and plan["tokens_are"] == "exact"


def test_dense_copies_take_two_bytes_a_number(directory: Path) -> None:
    """Of one of the three layers and of all, where NF4 takes half a byte a number."""
    words = [f"model.name={directory}", *WORDS, "peft=qlora", "peft.r=4"]
    none, one, whole = (make_plan("sft", [*words, f"quant.dense_layers={n}"]) for n in (0, 1, 5))
    assert "dense copies" not in none["memory"]
    in_four = none["memory"]["quantized weights"]
    assert [plan["memory"]["dense copies"] for plan in (one, whole)] == [round(in_four * 4 / 3), in_four * 4]
    assert whole["total_bytes"] - none["total_bytes"] == whole["memory"]["dense copies"]


def test_tokens_and_steps_are_the_runs_own(directory: Path, tmp_path: Path) -> None:
    import posttrain

    words = [f"model.name={directory}", *WORDS, "peft=lora", "eval.sets=null"]
    manifest = posttrain.run("sft", *words, f"run.dir={tmp_path}/run")
    plan = make_plan("sft", words)
    assert (plan["tokens"], plan["steps"]) == (manifest["tokens"], manifest["steps"])
    assert (plan["trained_parameters"], plan["total_parameters"]) == tuple(manifest["trainable"][k] for k in ("trained", "total"))


def test_the_papers_examples() -> None:
    assert adamw_bytes(175e9) == 2.8e12
    weights, constants = nf4_bytes(65e9)
    assert weights == 32.5e9 and constants == pytest.approx(1.03e9, rel=2e-3)
    assert nf4_bytes(65e9, double_quant=False)[1] == pytest.approx(4.0625e9)
    assert sum(nf4_bytes(2**30)) * 8 / 2**30 == pytest.approx(4.127, abs=5e-4)


def test_a_large_shape_takes_seconds_and_no_weights(tmp_path: Path) -> None:
    """Llama 3 8B by its config alone: no safetensors file is there to read."""
    load_tokenizer("tiny", None, None, None).save_pretrained(tmp_path)
    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, tie_word_embeddings=False, architectures=["LlamaForCausalLM"],
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config.to_dict(), default=str))
    words = [f"model.name={tmp_path}", "peft=qlora", "data.path=org/rows", "train.max_steps=10", "train.batch_size=1"]
    plan = make_plan("sft", words, 24 * 10**9)
    linear = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    assert plan["total_parameters"] - plan["trained_parameters"] == 8_030_261_248
    assert plan["trained_parameters"] == 41_943_040
    assert plan["memory"]["quantized weights"] == linear // 2
    assert plan["memory"]["weights"] == 2 * (8_030_261_248 - linear)
    assert plan["fits"] and plan["tokens_are"] == "at most"


@pytest.mark.slow
def test_what_would_make_it_fit_does(directory: Path) -> None:
    words = [f"model.name={directory}", *WORDS, "train.batch_size=8", "train.gradient_checkpointing=false"]
    whole = make_plan("sft", words, 10**12)["total_bytes"]
    plan = make_plan("sft", words, int(whole * 0.7))
    assert not plan["fits"] and plan["changes"]
    for change in plan["changes"]:
        again = make_plan("sft", [*words, *change["override"].split()], int(whole * 0.7))
        assert again["fits"] and again["total_bytes"] == change["total_bytes"]


def test_sharding_halves_what_is_sharded(directory: Path) -> None:
    one = make_plan("sft", [f"model.name={directory}", *WORDS])["memory"]
    two = make_plan("sft", [f"model.name={directory}", *WORDS, "train.fsdp=true", "train.processes=2"])["memory"]
    for part in ("weights", "gradients", "optimizer"):
        assert two[part] == one[part] / 2
    assert two["activations"] == one["activations"]


@pytest.mark.parametrize("method", [[], ["peft=lora"]])
def test_activations_are_what_autograd_keeps(directory: Path, method: list[str]) -> None:
    cfg = typed_config(compose_run("sft", [f"model.name={directory}", "model.dtype=float32", *method]))
    real = PackedLM(add_method(load_causal(str(directory), None, "float32", "cpu", None, None), cfg.peft, 10), "documents")
    weights = {p.untyped_storage().data_ptr() for p in real.parameters()}
    kept: dict[int, Any] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return tensor

    ids = torch.arange(96)[None] % 1000
    segments = (Segment(0, 48), Segment(48, 96))
    with saved_tensors_hooks(keep, lambda tensor: tensor):
        hidden = real.train().hidden(ids, DocumentMask(segments, 96, torch.device("cpu")), input_ids=ids)
    measured = sum(storage.nbytes() for storage in kept.values())
    planned = activations(model_of_shapes(LlamaConfig(**SHAPE), torch.float32, cfg.peft), 96, 2).whole
    assert hidden.requires_grad
    assert planned == pytest.approx(measured, rel=0.1)


def test_sizes_and_stages_in_words() -> None:
    assert parse_memory("48GB") == 48 * 10**9 and parse_memory("24GiB") == 24 * 2**30 and parse_memory("1000") == 1000
    with pytest.raises(UserError, match="--memory: 'much' is no size"):
        parse_memory("much")
    with pytest.raises(UserError, match=r"train\.max_steps: the rows of org/rows are not at hand"):
        make_plan("sft", ["model=tiny", "data.path=org/rows"])


def test_dpo_has_no_second_model(directory: Path) -> None:
    plan = make_plan("dpo", [f"model.name={directory}", *WORDS, "peft=lora"])
    assert plan["memory"]["reference"] == 8 * 40  # two log-probs in float32 a pair
    assert any("no second model" in line for line in plan["assumptions"])


def test_what_is_offloaded_is_counted_elsewhere(directory: Path) -> None:
    """Of three layers the weights of one; of activations those inside one layer."""
    words = [f"model.name={directory}", *WORDS, "+peft=qlora", "train.gradient_checkpointing=true"]
    none, layers, kept = (make_plan("sft", [*words, f"train.offload={what}"]) for what in ("none", "layers", "activations"))
    memory = layers["memory"]
    for part in ("quantized weights", "quantization constants"):
        assert memory[part] * 3 == pytest.approx(none["memory"][part], abs=2)
    assert none["memory"]["weights"] - memory["weights"] == 2 * 2 * 64 * 2  # norms of two layers in 16 bit
    same = ("adapters", "gradients", "optimizer", "logits", "activations")
    assert {part: memory[part] for part in same} == {part: none["memory"][part] for part in same}
    assert layers["total_parameters"] == none["total_parameters"]
    inputs = none["micro_batch_tokens"] * 64 * 2 * 3
    assert kept["memory"]["activations"] == pytest.approx(none["memory"]["activations"] - inputs, abs=2)
    assert kept["total_bytes"] == kept["memory_with_recomputation"] == kept["memory_without_recomputation"]


def test_ppos_parameters_are_those_of_all_roles() -> None:
    """18,496 of a LoRA of rank 4, for the policy and for the value model, and 128 of a head; the policy's alone stood here."""
    words = ["model=tiny", "+peft=lora", "peft.r=4", "data.max_rows=20", "reward.function=posttrain.rewards:overlap"]
    plan = make_plan("ppo", [*words, "train.max_steps=1"])
    assert (plan["trained_parameters"], plan["total_parameters"]) == (2 * 18_496 + 128, 493_888 + 18_496 + 128)
    plan = make_plan("ppo", [*words, "train.max_steps=1", "ppo.advantage=rloo", "ppo.samples=2"])
    assert (plan["trained_parameters"], plan["total_parameters"]) == (18_496, 493_888)
