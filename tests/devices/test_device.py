"""The rules of a device, there or planned for; torch.cuda is a stand-in. No card has been seen."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.devices.cards import CARDS, card_of
from posttrain.devices.device import Device, Rates
from posttrain.errors import UserError
from posttrain.stages.precision import autocast_of, computes_in_float16, settled

GIB = 2**30
# (what torch reports, GiB that it shows) -> row of the table
REPORTED = [
    ("NVIDIA H100 80GB HBM3", 79.1, "h100"), ("NVIDIA H100 PCIe", 79.1, "h100-pcie"), ("NVIDIA H200", 139.8, "h200"),
    ("NVIDIA A100-SXM4-80GB", 79.2, "a100"), ("NVIDIA A100-SXM4-40GB", 39.4, "a100-40"), ("NVIDIA L40S", 44.4, "l40s"),
    ("NVIDIA L4", 22.0, "l4"), ("NVIDIA GeForce RTX 4090", 23.6, "4090"), ("NVIDIA GeForce RTX 3090", 23.7, "3090"),
    ("Tesla T4", 14.6, "t4"), ("Tesla V100-SXM2-32GB", 31.7, "v100"), ("NVIDIA B200", 178.4, "b200"),
    ("AMD Instinct MI300X", 191.7, "mi300x"), ("NVIDIA RTX A6000", 47.5, "a6000"),
    ("NVIDIA A10G", 22.3, "a10g"), ("NVIDIA A10", 22.2, "a10"), ("NVIDIA A40", 44.5, "a40"), ("NVIDIA L40", 44.4, "l40"),
    ("NVIDIA RTX 6000 Ada Generation", 47.4, "6000-ada"), ("NVIDIA H20", 95.1, "h20"), ("NVIDIA GH200 480GB", 94.5, "gh200"),
    ("NVIDIA RTX PRO 6000 Blackwell Workstation Edition", 94.9, "pro-6000"), ("NVIDIA GeForce RTX 4080", 15.7, "4080"),
]  # fmt: skip


def a_card(monkeypatch: pytest.MonkeyPatch, *cards: tuple[str, float, tuple[int, int]]) -> None:
    """A machine with these: name, GiB, compute capability."""
    found = [SimpleNamespace(name=n, total_memory=int(g * GIB), major=c[0], minor=c[1]) for n, g, c in cards]
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: len(found))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda index: found[index])


@pytest.mark.parametrize(("reported", "memory", "name"), REPORTED)
def test_a_card_is_found_by_the_name_that_torch_reports(reported: str, memory: float, name: str) -> None:
    card = card_of(reported, memory * GIB)
    assert card and card.name == name


def test_a_laptops_card_and_an_unknown_one_have_no_row() -> None:
    assert card_of("NVIDIA GeForce RTX 4090 Laptop GPU", 16 * GIB) is None and card_of("NVIDIA X9", GIB) is None
    assert card_of("Quadro RTX 6000", 22.2 * GIB) is None  # Turing's, of which no row is


@pytest.mark.parametrize(("said", "name"), [("RTX-6000-Ada", "6000-ada"), ("rtx_pro_6000", "pro-6000"), ("A10G", "a10g")])
def test_a_card_has_the_name_that_people_write(said: str, name: str) -> None:
    found = Device.named(said).card
    assert found and found.name == name


def test_a_card_that_is_there_and_the_same_one_asked_for_have_the_same_rules(monkeypatch: pytest.MonkeyPatch) -> None:
    a_card(monkeypatch, ("NVIDIA GeForce RTX 4090", 24, (8, 9)))
    here, asked = Device.here(), Device.named("4090")
    assert (here.kind, here.capability, here.card, here.capacity) == (asked.kind, asked.capability, asked.card, asked.capacity)
    assert here.capacity == 23 * GIB and Device.named("RTX-4090") == asked


def test_memory_and_rates_of_a_card_by_hand() -> None:
    """Error correction takes a sixteenth of GDDR, and 1 GiB is CUDA's; 60 % of 362 TFLOP/s, 85 % of 864 GB/s."""
    card = Device.named("l40s")
    assert card.capacity == (48 * 15 / 16 - 1) * GIB
    assert card.rates("bfloat16") == Rates(0.6 * 362e12, 0.85 * 864e9)
    assert card.rates("float32") == Rates(0.6 * 91.6e12, 0.85 * 864e9)
    assert card.with_memory(10e9).capacity == 10e9
    assert Rates(10.0, 2.0).seconds([(100.0, 4.0), (0.0, 6.0), (5.0, 8.0)]) == 10 + 3 + 4


def test_every_row_of_the_table_says_all() -> None:
    for card in CARDS:
        assert card.half > card.single > 0 and card.bandwidth > 0 and card.source and card.memory >= 16
        assert (card.tf32 > 0) == (card.capability >= (8, 0))


def test_a_name_that_is_none_has_a_near_one() -> None:
    with pytest.raises(UserError, match=r"--device: there is no 'h10' - did you mean 'h100'\? \(there are: b200, h200"):
        Device.named("h10")


def config(*words: str) -> Any:
    return typed_config(compose_run("sft", ["model=qwen3", *words]))


@pytest.mark.parametrize("name", ["t4", "v100"])
def test_a_card_without_bfloat16_computes_in_float32_and_says_so(name: str) -> None:
    cfg, line = settled(config("+peft=qlora"), Device.named(name))
    assert (cfg.base_dtype, cfg.quant.compute_dtype, autocast_of(cfg, Device.named(name))) == ("float32", "float32", "no")
    assert (
        "computes no bfloat16" in line
        and "float32 in its place (model.dtype, quant.compute_dtype); model.dtype=float16 is faster" in line
    )
    full, line = settled(config(), Device.named(name))
    assert (full.base_dtype, autocast_of(full, Device.named(name)), line) == ("float32", "no", "")
    half, line = settled(config("+peft=lora", "model.dtype=float16"), Device.named(name))
    assert (half.base_dtype, line) == ("float16", "") and computes_in_float16(half) and not computes_in_float16(full)
    four, line = settled(config("+peft=qlora", "model.dtype=float16"), Device.named(name))
    assert (four.quant.compute_dtype, computes_in_float16(four)) == ("float16", True)
    assert line.endswith("float16 in its place (quant.compute_dtype)")


def test_weights_that_are_trained_are_not_in_float16() -> None:
    for words in ((), ("+peft=pissa",), ("peft=partial",)):
        with pytest.raises(UserError, match=r"model.dtype: float16 is too coarse for weights that are trained"):
            config("model.dtype=float16", *words)


def test_bfloat16_asked_for_by_name_is_refused_there() -> None:
    with pytest.raises(
        UserError, match=r"model.dtype: T4 16 GB \(compute capability 7.5\) computes no bfloat16.*model.dtype=float32"
    ):
        settled(config("+peft=lora", "model.dtype=bfloat16"), Device.named("t4"))
    with pytest.raises(UserError, match=r"train.precision: V100 32 GB \(compute capability 7.0\).*say train.precision=none"):
        settled(config("train.precision=bf16"), Device.named("v100"))


@pytest.mark.parametrize("name", ["3090", "h100", "mi300x"])
def test_newer_cards_compute_in_bfloat16(name: str) -> None:
    cfg = config("+peft=lora")
    assert settled(cfg, Device.named(name)) == (cfg, "") and cfg.base_dtype == "bfloat16"
    assert autocast_of(config(), Device.named(name)) == "bf16"
    assert autocast_of(cfg, Device.named(name)) == "no"


def test_a_cpu_computes_in_bfloat16_without_autocast() -> None:
    cpu = Device("cpu", "a CPU", 1e9)
    assert settled(config("+peft=lora"), cpu)[1] == "" and autocast_of(config(), cpu) == "no"
    assert Device.at(torch.device("cpu")).kind == "cpu"
