"""The reference is the model that a stage is given, without dropout, in the very batches that are trained on."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from tests.models.peft.plain import plain_lora
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.data.collate import BatchSampler, pack_pairs
from posttrain.data.examples import Examples, build
from posttrain.losses.tokens import answer_sums
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.runs.cache import cached_tensors
from posttrain.stages.dpo.reference import reference_logps, train_reference

CPU = torch.device("cpu")


@pytest.fixture
def lm() -> PackedLM:
    """An adapter that has learned something, as that of a run that goes on has, under heavy dropout."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    lora = plain_lora(dropout=0.5)
    model: Any = add_method(LlamaForCausalLM(config), lora)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.3)
    return PackedLM(model, "documents").train()


def pairs(count: int = 6) -> Examples:
    drawn = torch.Generator().manual_seed(1)
    rows = []
    for number in range(count):
        tokens = torch.randint(3, 64, (9,), generator=drawn).tolist()
        rows.append((tokens, [0.0] * 3 + [1.0] * 6, number))
    return build(rows, splits=[(3, 3 + 2 + number % 3) for number in range(count)])


def logps_of(lm: PackedLM, units: list[int]) -> torch.Tensor:
    batch = pack_pairs(pairs(), units)
    with torch.no_grad():
        return answer_sums(lm(batch), batch.sequence_id, batch.num_answers)


def test_it_is_computed_without_dropout_and_the_first_margin_is_zero(lm: PackedLM) -> None:
    units = [0, 3, 5]
    batch = pack_pairs(pairs(), units)
    assert float((logps_of(lm, units) - logps_of(lm, units)).abs().max()) > 1e-2, "dropout changes nothing, so nothing is shown"
    found = reference_logps(lm, batch, CPU)
    policy = logps_of(lm.eval(), units)
    assert torch.equal(found, policy)
    ratio = policy - found
    assert (ratio[0::2] - ratio[1::2]).tolist() == [0.0, 0.0, 0.0] and policy.unique().numel() == 6


def test_every_pair_that_is_drawn_has_its_own_and_no_other(lm: PackedLM, tmp_path: Path) -> None:
    """Pairs 5, 0, 2, 4 in two steps of two, the first of them once more; from the file the second time."""
    order = BatchSampler(torch.tensor([5, 0, 2, 4, 5, 0]).numpy(), 2, 1, 1)
    file = tmp_path / "reference" / "table.safetensors"

    def cached(check: Callable[[], None]) -> torch.Tensor:
        make = partial(train_reference, lm, pairs(), order, Accelerator(cpu=True), check)
        return cached_tensors(file, lambda: {"reference": make()})["reference"]

    table = cached(lambda: None)
    assert table.isnan().tolist() == [[False] * 2, [True] * 2, [False] * 2, [True] * 2, [False] * 2, [False] * 2]
    lm.eval()
    for units in ([5, 0], [2, 4]):
        assert torch.equal(table[units].flatten(), logps_of(lm, units))
    with torch.no_grad():
        for p in lm.parameters():
            p.zero_()
    again = cached(lambda: pytest.fail("computed again"))
    assert torch.equal(again.nan_to_num(), table.nan_to_num())
