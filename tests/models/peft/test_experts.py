"""Adapters on fused experts: which layers they reach, what lies in their files, and that it is B A of every expert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tests.models.peft.moe import CLASSES, FAST, E, logits, tiny, train
from transformers import AutoModelForCausalLM

from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.errors import UserError
from posttrain.models.language.actor_critic import add_beside
from posttrain.models.peft.attach import add_frozen, add_method, load_adapter
from posttrain.models.peft.export import export_adapter
from posttrain.models.peft.merge import Adapter
from posttrain.models.peft.methods.lora import Lora
from posttrain.models.peft.methods.rslora import RsLora

SAID: dict[str, Any] = {
    "dropout": 0.0, "targets": "all-linear", "dtype": "float32", "lr_factor": 1.0, "experts": True, "router": False,
}  # fmt: skip
EVERY = [*FAST, *(pytest.param(name, marks=pytest.mark.slow) for name in CLASSES if name not in FAST)]


def lora(r: int = 4, alpha: float = 8.0, **more: Any) -> Lora:
    return Lora(
        **(
            SAID
            | {
                "method": "lora",
                "init": "default",
                "init_rows": 64,
                "rank_pattern": None,
                "alpha_pattern": None,
                "r": r,
                "alpha": alpha,
            }
            | more
        )
    )


def base_of(name: str, folder: Path, **more: Any) -> Path:
    tiny(name, **more).save_pretrained(folder / "base")
    return folder / "base"


def load(base: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def finished(base: Path, out: Path, method: Any = None, seed: int = 1) -> Any:
    model: Any = add_method(load(base), method or lora())
    train(model, seed)
    export_adapter(model, out, str(base))
    return model


@pytest.mark.parametrize("name", EVERY)
def test_plain_peft_loads_what_was_trained(name: str, tmp_path: Path) -> None:
    """And so does our own loading; every linear layer that is asked for has its LoRA, the experts too."""
    base = base_of(name, tmp_path)
    live = finished(base, tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert any(".experts." in key for key in tensors)
    assert not torch.allclose(logits(live), logits(load(base)), atol=1e-2)
    for again in (PeftModel.from_pretrained(load(base), str(tmp_path / "out")), load_adapter(load(base), tmp_path / "out")):
        torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=2e-5)


@pytest.mark.parametrize("name", EVERY)
def test_the_change_of_an_expert_is_its_own_b_a(name: str, tmp_path: Path) -> None:
    """(alpha / r) B_e A_e by hand, from the file, against what plain peft merges."""
    base = base_of(name, tmp_path)
    finished(base, tmp_path / "out", lora(r=3, alpha=6.0))
    plain = load(base)
    before = {key: value.clone() for key, value in plain.state_dict().items()}
    after = PeftModel.from_pretrained(plain, str(tmp_path / "out")).merge_and_unload().state_dict()
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    experts = [key for key, value in before.items() if ".experts." in key and value.ndim == 3]
    for key in experts:
        last = [name for name in experts if name.rpartition(".")[0] == key.rpartition(".")[0]][-1]
        place = key.rpartition(".")[0] + ("" if key == last else ".base_layer")  # the last of a module's parameters lies outside
        a, b = (tensors[f"base_model.model.{place}.lora_{half}.weight"] for half in "AB")
        for expert in range(E):
            rows = a[3 * expert : 3 * expert + 3]  # rows of A go by expert, columns of B by rank
            columns = b[:, expert::E]
            change = 2.0 * columns @ rows
            found = after[key][expert] - before[key][expert]
            torch.testing.assert_close(
                found, change if found.shape == change.shape and name != "gpt_oss" else change.T, rtol=0, atol=1e-5
            )
    assert experts


def changed(model: Any, base: Any) -> set[str]:
    """Kinds of parameters that another function would have: those with an adapter."""
    return {name.split(".lora_")[0] for name, _ in model.named_parameters() if ".lora_A." in name}


def test_a_router_and_what_is_narrower_than_the_rank_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    model = add_method(tiny("qwen2_moe"), lora(r=2))
    assert not any("gate.lora" in name or "shared_expert_gate.lora" in name for name, _ in model.named_parameters())
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "shared_expert_gate" in line and "narrower than rank 2" in line]
    assert [line for line in lines if "router" in line and "peft.router=true" in line]
    with_router = add_method(tiny("qwen2_moe"), lora(r=2, router=True))
    assert [name for name, _ in with_router.named_parameters() if ".mlp.gate.lora_A." in name]


def test_experts_are_left_out_where_they_are_not_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    model = add_method(tiny("qwen3_moe"), lora(experts=False))
    assert not [name for name, _ in model.named_parameters() if "experts" in name and "lora" in name]
    assert "experts" in capsys.readouterr().out


def test_names_and_patterns_see_experts() -> None:
    for targets in (["experts.gate_up_proj"], r".*experts\.gate_up_proj"):
        model = add_method(tiny("qwen3_moe"), lora(targets=targets))
        found = [name for name, p in model.named_parameters() if p.requires_grad]
        assert found == [f"base_model.model.model.layers.1.mlp.experts.lora_{half}.default.weight" for half in "AB"]
    with pytest.raises(UserError, match=r"peft\.targets: .*'gate_proj'.* experts\.gate_up_proj"):
        add_method(tiny("mixtral"), lora(targets=["gate_proj"]))


@pytest.mark.parametrize("name", EVERY)
def test_stacked_adapters_on_experts_become_one(name: str, tmp_path: Path) -> None:
    base = base_of(name, tmp_path)
    finished(base, tmp_path / "init")
    model: Any = add_method(load(base), lora(r=3, alpha=9.0))
    add_frozen(model, tmp_path / "init")
    train(model, 2)
    export_adapter(model, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=5e-5)
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 7


def test_rslora_keeps_its_scale_on_experts(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path)
    method = RsLora(
        **(
            SAID
            | {
                "method": "rslora",
                "init": "default",
                "init_rows": 64,
                "rank_pattern": None,
                "alpha_pattern": None,
                "r": 4,
                "alpha": 3.0,
            }
        )
    )
    live = finished(base, tmp_path / "out", method)
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-5)


def test_a_finished_adapter_on_experts_is_trained_on(tmp_path: Path) -> None:
    base = base_of("deepseek_v3", tmp_path)
    live = finished(base, tmp_path / "out")
    again = lora().continue_from(load(base), tmp_path / "out")
    torch.testing.assert_close(logits(again), logits(live), rtol=0, atol=1e-5)
    names = {name for name, p in again.named_parameters() if p.requires_grad}
    assert names == {name for name, p in live.named_parameters() if p.requires_grad}


def test_the_file_is_read_by_parameter(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path)
    finished(base, tmp_path / "out")
    adapter = Adapter(tmp_path / "out", "run")
    assert "model.layers.1.mlp.experts.gate_up_proj" in adapter.modules
    assert "model.layers.0.mlp.gate_proj" in adapter.modules
    found = adapter.factors("model.layers.1.mlp.experts.gate_up_proj")
    assert (found.experts, found.rank, found.change().shape) == (E, 4, (E, 48, 32))


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"r": 3}, r"peft\.r: .* has 4, not 3; say peft\.r=4"),
        ({"alpha": 9.0}, r"peft\.alpha: .* has 8, not 9\.0; say peft\.alpha=8"),
        (
            {"experts": False},
            r"peft\.targets: .* is on experts\.down_proj, experts\.gate_up_proj too; say peft\.targets=",
        ),
        ({"targets": ["q_proj", "k_proj", "lora"]}, "no linear layer matches"),
        ({"targets": ["q_proj", "gate.weight"]}, "is not on gate and is on .*down_proj"),
    ],
)
def test_other_settings_than_a_finished_adapters_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path)
    finished(base, tmp_path / "out")
    with pytest.raises(UserError, match=message):
        lora(**more).continue_from(load(base), tmp_path / "out")


def test_dropout_is_what_the_run_asks_for(tmp_path: Path) -> None:
    base = base_of("qwen3_moe", tmp_path)
    live = finished(base, tmp_path / "out", lora(dropout=0.25))
    for model, p in ((live, 0.25), (lora(dropout=0.5).continue_from(load(base), tmp_path / "out"), 0.5)):
        found = [m.lora_dropout["default"] for m in model.modules() if hasattr(m, "lora_dropout")]
        assert {getattr(m, "p", 0.0) for m in found} == {p, 0.0}  # none on experts


@pytest.mark.parametrize("name", ["dora", "pissa", "adalora", "vera", "adapter"])
def test_methods_that_cannot_be_put_on_experts_leave_them_out(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a line; and what they leave plain peft loads, if it is one of its own."""
    method: Any = typed_config(compose_run("sft", [f"+peft={name}", *MORE.get(name, ["peft.r=4"])])).peft
    base = base_of("qwen3_moe", tmp_path)
    live: Any = add_method(load(base), method, 10)
    assert "experts" in capsys.readouterr().out
    assert not [n for n, p in live.named_parameters() if p.requires_grad and ".experts." in n]
    if name == "adapter":
        assert [n for n, p in live.named_parameters() if p.requires_grad and "layers.0.mlp" in n]
        assert not [n for n, p in live.named_parameters() if p.requires_grad and "layers.1.mlp" in n]
        return
    assert "experts" in str(method.record(live)["left_out"])
    if name != "pissa":  # which takes what it began with off again
        train(live)
    export_adapter(live, tmp_path / "out", str(base))
    again = PeftModel.from_pretrained(load(base), str(tmp_path / "out"))
    expected = logits(load(base)) if name == "pissa" else logits(live)
    torch.testing.assert_close(logits(again), expected, rtol=0, atol=5e-5)


MORE = {"adalora": ["peft.r=4", "peft.init_r=6"], "vera": ["peft.r=16"]}


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3"])
def test_a_value_models_adapter_lies_beside_the_policys(name: str) -> None:
    """PPO's: on the same experts, with factors of its own. peft would name the experts of a second adapter otherwise."""
    model: Any = add_method(tiny(name), lora())
    before = {key for key, _ in model.named_parameters()}
    add_beside(model, "default", "value", torch.float32)
    added = {key for key, _ in model.named_parameters()} - before
    assert added == {key.replace(".default.", ".value.") for key in before if ".default." in key}
    assert any(".experts." in key for key in added)
