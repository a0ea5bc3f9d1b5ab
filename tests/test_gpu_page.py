"""docs/gpu.md's tables: every row against arithmetic by hand, and two of them made again."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import gpu_page
from gpu_page import COLUMNS, LENGTH, ROWS, Row, line, model_directory, plan_of
from posttrain.devices.device import Device

PAGE = gpu_page.PAGE
pytestmark = pytest.mark.skipif(not PAGE.exists(), reason="runs from a checkout only")
VOCABULARY = 128_256
# width, MLP, layers; keys and values of both have 8 heads of 128
SHAPES = {"8B": (4096, 14336, 32), "70B": (8192, 28672, 80)}
CASES = [(shape, row) for shape, rows in ROWS.items() for row in rows]


def numbers(shape: str) -> tuple[int, int, int, int]:
    """Of the linear layers, of embedding and head together, of norms, and of LoRA of rank 16 on all linear layers."""
    width, inner, layers = SHAPES[shape]
    linear = layers * (2 * width * width + 2 * width * 1024 + 3 * width * inner)
    lora = layers * 16 * (2 * (width + width) + 2 * (width + 1024) + 3 * (width + inner))
    return linear, 2 * VOCABULARY * width, (2 * layers + 1) * width, lora


def test_a_billion_is_a_billion() -> None:
    """The numbers of Llama 3 as everybody counts them, and of its LoRA."""
    assert [sum(numbers(shape)[:3]) for shape in SHAPES] == [8_030_261_248, 70_553_706_496]
    assert [numbers(shape)[3] for shape in SHAPES] == [41_943_040, 207_093_760]


def stands(shape: str, row: Row) -> dict[str, float]:
    """GB by column, as the page has them."""
    part = PAGE.read_text(encoding="utf-8").split(f"### Llama 3 {shape}")[1].split("###")[0]
    cells = next(each for each in part.splitlines() if each.startswith(f"| {row.title} |")).split("|")[2:]
    return {name: float(cell.strip() or 0) for name, cell in zip([*COLUMNS, "total"], cells, strict=False)}


def expected(shape: str, row: Row) -> dict[str, float]:
    """Bytes by column; by hand."""
    (linear, words, norms, lora), (width, _, layers) = numbers(shape), SHAPES[shape]
    whole = linear + words + norms
    if row.devices > 1:  # float32, shared; gathered in 16 bit: two layers, and what is in none
        gathered = 2 * (2 * (linear + norms - width) / layers + words + width)
        shared = {"base": 4.0, "gradients": 4.0, "moments": 8.0}
        return {name: size * whole / row.devices for name, size in shared.items()} | {"gathered": gathered}
    four_bit = "+peft=qlora" in row.words
    base = (0.5 + 0.127 / 8) * linear + 2 * (words + norms) if four_bit else 2.0 * whole
    paged = four_bit and 8 * lora >= 2**30
    trained = {"adapters": 4.0 * lora, "gradients": 4.0 * lora, "moments": (2 + 8 / 256 if paged else 8.0) * lora}
    roles = 0.0
    if row.stage == "ppo":
        roles = sum(trained.values()) + 2 * layers * 1024 * LENGTH * 32 * 2
    return {"base": base, **trained, "roles, cache": roles}


@pytest.mark.parametrize(("shape", "row"), CASES, ids=lambda each: each if isinstance(each, str) else each.title)
def test_every_row_by_hand(shape: str, row: Row) -> None:
    found, wanted = stands(shape, row), expected(shape, row)
    for name in {*COLUMNS} - {"loss", "activations"}:
        # a number of GB with two digits; a 4-bit base is rounded up to whole blocks, small moments stay in 32 bit
        assert found[name] == pytest.approx(wanted.get(name, 0.0) / 1e9, abs=0.006, rel=2e-3), name
    assert found["total"] == pytest.approx(sum(found[name] for name in COLUMNS), abs=0.05)
    width, inner, layers = SHAPES[shape]
    inputs = 2.0 * layers * LENGTH * width * (2 if row.devices > 1 else 1) / 1e9  # of float32 weights they are float32
    # beside them one layer in whole: at least the MLP's two halves, and their gradients; at most each of its numbers, and
    # of theirs, ten times over
    assert inputs + 4 * 2 * LENGTH * inner / 1e9 < found["activations"] < inputs + 20 * 4 * LENGTH * (inner + width) / 1e9
    assert 0 < found["loss"] < 6  # tiles of logits: never 2,048 * 128,256 * 12 bytes more


def test_the_page_names_the_smallest_card() -> None:
    """QLoRA of 70B: 45.9 GB fit the 45 GiB of an L40S with error correction, less 1, and nothing with less memory."""
    text = PAGE.read_text(encoding="utf-8")
    row = next(each for each in text.split("### Llama 3 70B")[1].splitlines() if each.startswith("| `sft +peft=qlora` |"))
    total = stands("70B", ROWS["70B"][1])["total"] * 1e9
    assert "| l40s |" in row and Device.named("5090").capacity < total < Device.named("l40s").capacity == 44 * 2**30


def test_the_prose_is_the_templates() -> None:
    before, after = gpu_page.template().split("{tables}")
    page = PAGE.read_text(encoding="utf-8")
    assert page.startswith(before) and page.endswith(after), "run python scripts/gpu_page.py"
    assert len(re.findall(r"^\| `", page, re.M)) >= len(CASES)


def test_what_a_card_reached_is_made_of_the_report() -> None:
    """Made-up figures; what was measured on a CPU is left out."""
    card = {"contender": "posttrain", "device": "NVIDIA MADE-UP"}
    speed = {"tokens_per_second": 1234.4, "spread": [1200.0, 1300.6], "share_of_matmul_rate": 0.5512, "peak_gb": 12.34}
    cases = [
        {"case": "8b lora", **card, **speed}, {"case": "longest", **card, "longest_tokens": 65536},
        {"case": "8b rollout", **card, "tokens_per_second": 900.0, "peak_gb": 20.0},
        {"case": "65b", "contender": "posttrain", "failed": "out | of memory"},
        {"case": "toy", "contender": "posttrain", "device": "CPU", **speed},
    ]  # fmt: skip
    libraries = {"torch": "2.99", "transformers": "5.99", "bitsandbytes": "0.99"}
    report = {"cases": cases, "left_out": ["1b full: trl"], "libraries": libraries, "date": "2030-01-02"}
    made = gpu_page.seen(report)
    assert "NVIDIA MADE-UP, 2030-01-02, torch 2.99, transformers 5.99, bitsandbytes 0.99." in made and "toy" not in made
    assert [each for each in made.splitlines() if each.startswith("|")][2:] == [
        "| 8b lora | posttrain | 1,234 | 1,200 to 1,301 | 55.1% | 12.3 |",
        "| longest | posttrain | a row of 65,536 tokens fits |  |  |  |",
        "| 8b rollout | posttrain | 900 |  |  | 20.0 |",
        "| 65b | posttrain | failed: out / of memory |  |  |  |",
    ]
    assert made.endswith("Not begun for want of time: 1b full: trl.")


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 3])
def test_a_row_is_what_the_plan_says_today(number: int, tmp_path: Path) -> None:
    row = ROWS["8B"][number]
    made = line(row, plan_of(row, model_directory("8B", tmp_path)))
    assert made in PAGE.read_text(encoding="utf-8"), "run python scripts/gpu_page.py"
