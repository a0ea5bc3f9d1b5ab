"""A plan for a card that is not here: its rules, against hand arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import LlamaConfig

from posttrain.commands.plan.need import Need, largest
from posttrain.commands.plan.plan import make_plan, on_devices
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.devices.device import Device
from posttrain.errors import UserError
from posttrain.models.kernels.tiles import TILE
from posttrain.models.language.activations import activations, model_of_shapes
from posttrain.models.language.room import Layers
from posttrain.models.language.tokenizer import load_tokenizer
from posttrain.models.language.work import autocast_to, cost

SHAPE: dict[str, Any] = {
    "vocab_size": 1024, "hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": False,
}  # fmt: skip
LINEAR = 3 * (2 * 64 * 64 + 2 * 64 * 32 + 3 * 64 * 192)
WORDS = ["train.max_steps=4", "train.batch_size=2", "data.max_rows=40"]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    LlamaConfig(**SHAPE, architectures=["LlamaForCausalLM"]).save_pretrained(folder)
    load_tokenizer("tiny", None, None, None).save_pretrained(folder)
    return str(folder)


def plan(directory: str, device: str, *words: str, memory: int | None = None) -> dict[str, Any]:
    return make_plan("sft", [f"model.name={directory}", *WORDS, *words], memory, Device.named(device))


def test_the_rules_are_the_cards(directory: str) -> None:
    """Moments in 8 bits where the card is CUDA's, and not paged where they are small; on a T4 nothing is in bfloat16."""
    small = plan(directory, "4090", "+peft=qlora", "peft.r=32")
    assert small["optimizer"] == "adamw" and any("to page moments" in line for line in small["assumptions"])
    found = plan(directory, "4090", "+peft=qlora", "peft.r=32", "optim=adamw_8bit")
    assert (found["optimizer"], found["dtype"], found["kind"]) == ("adamw_8bit", "bfloat16", "cuda")
    # of a layer's factors 9 have 2,048 numbers, 2 have 1,024 and 3 have 6,144, of which 256 share a constant
    assert found["memory"]["optimizer"] == 3 * (8 * (9 * 2048 + 2 * 1024) + 3 * 2 * (6144 + 4 * 24))
    old = plan(directory, "t4", "+peft=qlora", "peft.r=32")
    assert old["dtype"] == "float32" and old["memory"]["weights"] == 2 * found["memory"]["weights"]
    assert any("computes no bfloat16" in line for line in old["assumptions"])


def test_full_training_has_float32_weights_and_products_in_bfloat16(directory: str) -> None:
    found = plan(directory, "h100")
    assert (found["autocast"], found["dtype"], found["optimizer"]) == ("bf16", "float32", "adamw")
    numbers = LINEAR + 2 * 1024 * 64 + 7 * 64
    assert found["memory"]["weights"] == found["memory"]["gradients"] == 4 * numbers
    assert found["memory"]["optimizer"] == 8 * numbers


def test_several_cards_share_what_fsdp_shards(directory: str) -> None:
    words = on_devices(["train.fsdp=true"], 4)
    one, four = plan(directory, "h100"), plan(directory, "h100", *words)
    assert four["devices"] == 4
    for part in ("weights", "gradients", "optimizer"):
        assert four["memory"][part] == one["memory"][part] / 4
    layer = (LINEAR // 3 + 2 * 64) * 2  # in bfloat16
    assert four["memory"]["gathered layers"] == 2 * layer + (2 * 1024 * 64 + 64) * 2
    with pytest.raises(UserError, match=r"--devices: 4, and train.processes=2; leave one of them out"):
        on_devices(["train.processes=2"], 4)


def test_operations_are_those_of_the_formula() -> None:
    """Full training: products three times, attention two forward and five backward, of half of the keys in each document, and the
    head's four times, as its logits are made twice."""
    cfg = typed_config(compose_run("sft", ["model=tiny"]))
    found = activations(model_of_shapes(LlamaConfig(**SHAPE), torch.float32, cfg.peft), 96, 2)
    attention = 7 * 2 * 96 * (48 - 24) * 64 * 3
    assert found.flops == 6 * 96 * LINEAR + attention + 8 * 96 * 1024 * 64


def test_bytes_that_are_moved_by_hand() -> None:
    """Of x * w, then its sum, then of the gradient; views move nothing."""
    x, w = torch.empty(8, 4, device="meta"), torch.empty(8, 4, device="meta", requires_grad=True)
    _, found = cost(lambda: (x * w).view(32), lambda y: [y])
    assert found.forward == ((0.0, 3 * 128.0),) and found.kept == 128
    _, product = cost(lambda: x @ w.T, lambda y: [y])
    assert product.forward == ((2.0 * 8 * 8 * 4, 128.0 + 128 + 256),)


class Block(nn.Module):
    """As a layer is made: a norm, products, what is between them, the input added."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 40), nn.Linear(40, 16, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(nn.functional.silu(self.up(self.norm(x)))) @ self.down.weight[:, :16]


def test_what_autocast_keeps_is_what_autocast_keeps() -> None:
    """Against torch's own on a CPU: parameters have one copy in 16 bits."""
    real, kept = Block(), dict[int, int]()
    own = {p.untyped_storage()._cdata for p in real.parameters()}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage()._cdata not in own:
            kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    x = torch.randn(8, 16, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), saved_tensors_hooks(keep, lambda tensor: tensor):
        found = real(real(x))
    shapes, y = Block().to("meta"), torch.empty(8, 16, device="meta", requires_grad=True)
    with autocast_to(torch.bfloat16):
        planned, counted = cost(lambda: shapes(shapes(y)), lambda z: [z], shapes.parameters())
    assert planned.dtype == found.dtype == torch.float32
    assert counted.kept == sum(kept.values())


@pytest.mark.slow
def test_the_largest_that_fits_fits_and_one_more_does_not(directory: str) -> None:
    memory = 4_000_000
    found = plan(directory, "4090", "+peft=lora", "peft.r=4", memory=memory)
    largest = found["largest_batch_size"]
    need = Need(100.0, 50.0, 10.0, 1.0, 10.0, 4, lambda tokens: 2.0 * tokens, "auto", 1000.0)
    most = need.most()
    assert need.fits(most) and not need.fits(most + 1)
    assert largest >= 1 and found["capacity_bytes"] == memory
    whole = {"train.batch_size=": largest, "train.batch_size=+1": largest + 1}
    fits = [plan(directory, "4090", "+peft=lora", "peft.r=4", f"train.batch_size={n}", memory=memory) for n in whole.values()]
    longest = found["longest_unit"]
    assert [each["micro_batch_tokens"] <= n * longest for each, n in zip(fits, whole.values(), strict=True)] == [True, True]
    assert fits[0]["fits"]


@pytest.mark.slow
def test_the_largest_grows_with_recomputation_and_with_offload(directory: str) -> None:
    """As memory for activations does: all of them, layers' inputs and one layer, that layer alone; and without most weights."""
    ways = ["train.gradient_checkpointing=false", "train.gradient_checkpointing=true", "train.offload=activations"]
    found = [plan(directory, "4090", "+peft=qlora", "peft.r=4", way, memory=30_000_000) for way in ways]
    kept = [each["memory"]["activations"] for each in found]
    assert kept == sorted(set(kept), reverse=True)
    inputs = kept[1] - kept[2]
    assert inputs == found[1]["micro_batch_tokens"] * 3 * 64 * 2  # of three layers, in 16 bit
    streamed = plan(directory, "4090", "+peft=qlora", "peft.r=4", "train.offload=layers", memory=30_000_000)
    assert streamed["memory"]["activations"] == kept[1] and streamed["total_bytes"] < found[1]["total_bytes"]
    for figure in ("largest_unit", "largest_batch_size"):
        largest = [each[figure] for each in found]
        assert largest == sorted(set(largest)) and streamed[figure] >= largest[1]


def test_the_largest_multiple_up_to_a_border() -> None:
    for end in range(40):
        for most in (0, 1, 12, 31, 1000):
            assert largest(lambda n, end=end: n <= end, 4, most) == min(end, most) // 4 * 4
    assert largest(lambda n: n <= 1000) == 1000


def test_layers_are_recomputed_as_a_run_chooses() -> None:
    """90 % of what is left after the weights is there for the rest; a layer of those that are recomputed is there in whole,
    and what its backward works with, 1.4 times as much."""
    need = Need(100.0, 50.0, 10.0, 1.0, 10.0, 4, lambda tokens: 2.0 * tokens, "auto", 1000.0)
    assert need.recomputed(10) == 0 == Layers(100, 10, 4, 100).to_recompute(810 - 50 - 20)
    assert need.total(10) == 100 + 50 + 20 + 400 + 10 * 14
    assert need.recomputed(20) == Layers(200, 20, 4, 200).to_recompute(810 - 50 - 40) == 4
    assert need.total(20) == 100 + 50 + 40 + 20 * (4 * 1 + 10 + 14)
    assert Need(0, 0, 10.0, 1.0, 5.0, 4, lambda tokens: 0.0, True, 0).total(10) == 4 * 10 + 100 + 140
    tiled = Need(0, 0, 1.0, 0.1, 0.5, 4, lambda tokens: 0.0, True, 0)
    assert tiled.total(4 * TILE) == pytest.approx(TILE * (4 * 0.4 + 2.4 * (2 + 0.5)))
    assert Need(0, 0, 10.0, 1.0, 5.0, 4, lambda tokens: 0.0, 3, 0).total(10) == 100 + 30 + 100 + 140


def test_a_faster_card_is_faster_by_its_rates(directory: str) -> None:
    slow, fast = (plan(directory, name, "+peft=lora", "peft.r=4") for name in ("a100-40", "a100"))
    assert slow["tokens"] == fast["tokens"] and slow["seconds"] >= fast["seconds"]
    assert any("60% of 312 TFLOP/s" in line and "85% of 1,555 GB/s" in line for line in slow["assumptions"])
    assert any("assumed shares, not measured ones" in line for line in slow["assumptions"])
