"""How a LoRA begins, and layers of other ranks: the base at the start, the exact change at the end, in plain peft too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.models.peft.test_methods import LAYERS, load, logits, make, trained
from tests.models.peft.written import assert_written_is_live

from posttrain.config.compose import compose_run, validate
from posttrain.errors import UserError
from posttrain.models.counting import count_parameters
from posttrain.models.peft.attach import NEW, add_method
from posttrain.models.peft.export import export_adapter, lora_layers

PATTERN = "peft.rank_pattern={down_proj: 8, layers.0.self_attn.q_proj: 2}"


def method(*more: str) -> Any:
    return validate(compose_run("sft", ["peft=lora", "peft.r=4", *more])).peft


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    make("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    "more", [("peft.init=olora",), ("peft.init=pissa", PATTERN), (PATTERN, "peft.alpha_pattern={up_proj: 3}")]
)
def test_the_base_at_the_start_and_the_whole_change_in_plain_peft(base: Path, more: tuple[str, ...], tmp_path: Path) -> None:
    bare = logits(load(base))
    model: Any = add_method(load(base), method(*more), 10)
    torch.testing.assert_close(logits(model), bare, rtol=0, atol=2e-5)
    trained(model)
    assert_written_is_live(model, base, tmp_path, 2e-5)


def test_olora_begins_orthonormal_and_takes_it_out_of_the_base() -> None:
    before = {name: p.detach().clone() for name, p in make("llama").named_parameters()}
    model: Any = add_method(make("llama"), method("peft.init=olora", "peft.alpha=4"), 10)
    name, layer = next(iter(lora_layers(model).items()))
    a, b = layer.lora_A[NEW].weight, layer.lora_B[NEW].weight
    torch.testing.assert_close(b.T @ b, torch.eye(4), rtol=0, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight + b @ a, before[f"{name}.weight"], rtol=0, atol=1e-6)


def test_ranks_and_numbers_by_hand(tmp_path: Path) -> None:
    """r 4 of all; 8 of both down_proj (96 + 64 each), 2 of one q_proj (64 + 64)."""
    plain = count_parameters(add_method(make("llama"), method(), 10))[0]
    with torch.device("meta"):
        shapes = make("llama")
    for model in (make("llama"), shapes):
        found = count_parameters(add_method(model, method(PATTERN), 10))[0]
        assert found == plain + LAYERS * 4 * (96 + 64) - 2 * (64 + 64)
    model: Any = add_method(make("llama"), method(PATTERN), 10)
    export_adapter(model, tmp_path, "base")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 8


def test_a_pattern_that_nothing_matches_is_named() -> None:
    with pytest.raises(UserError, match=r"^peft.rank_pattern: no layer that gets an adapter is called 'down_prj'.*down_proj"):
        add_method(make("llama"), method("peft.rank_pattern={down_prj: 8}"), 10)


def test_what_writes_into_the_base_is_refused_where_that_cannot_be() -> None:
    with pytest.raises(UserError, match=r"quant=nf4 cannot be trained by lora with peft\.init=olora, which writes into the base"):
        validate(compose_run("sft", ["peft=lora", "peft.init=olora", "quant=nf4"]))
    assert validate(compose_run("sft", ["peft=lora", "peft.init=olora"])).base_dtype == "float32"
    assert validate(compose_run("sft", ["peft=lora"])).base_dtype == "bfloat16"


def test_going_on_with_other_ranks_is_refused(base: Path, tmp_path: Path) -> None:
    model: Any = add_method(load(base), method(), 10)
    trained(model)
    export_adapter(model, tmp_path, str(base))
    with pytest.raises(UserError, match=r"^peft.rank_pattern: chain.mode=continue goes on with the ranks"):
        method(PATTERN).continue_from(load(base), tmp_path)
