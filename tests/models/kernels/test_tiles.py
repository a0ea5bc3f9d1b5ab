"""An MLP in tiles of tokens: the same gradients as in one piece, no more products, nothing as wide as it of all tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from tests.models.kernels.test_fused import FAMILIES, SHAPE, difference, with_lora
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain.models.kernels.choice import use_kernels
from posttrain.models.kernels.tiles import SIZE, TILE, go_in_tiles, largest_tile, number_of
from posttrain.models.language.packed_lm import PackedLM

TOKENS = torch.randint(97, (1, 40), generator=torch.Generator().manual_seed(1))
INNER = SHAPE["intermediate_size"]


def full(config: LlamaConfig, dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, dtype=dtype).train()


def recomputed(model: Any, tile: int | None) -> Any:
    lm = PackedLM(model, "documents")
    lm.recompute(2, tile)
    return model


def loss_of(model: nn.Module, tokens: Tensor = TOKENS) -> Tensor:
    torch.manual_seed(2)
    return model(input_ids=tokens, use_cache=False).logits.log_softmax(-1)[..., 3].sum()


def gradients(model: nn.Module) -> tuple[float, dict[str, Tensor]]:
    loss = loss_of(model)
    loss.backward()
    return float(loss.detach()), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def attention_alone() -> Any:
    from peft import LoraConfig, get_peft_model

    return get_peft_model(full(FAMILIES["llama"]), LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False)).train()


MODELS: dict[str, Callable[[], Any]] = {
    "lora": lambda: with_lora(FAMILIES["llama"]), "qwen3": lambda: with_lora(FAMILIES["qwen3"]),
    "full": lambda: full(FAMILIES["llama"]), "an MLP that is frozen": attention_alone,
}  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("tile", [8, 13])
def test_the_same_gradients_as_in_one_piece(model: str, tile: int, autocast: bool) -> None:
    whole, tiled = recomputed(MODELS[model](), None), recomputed(MODELS[model](), tile)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        (loss, wanted), (of_tiles, found) = gradients(whole), gradients(tiled)
    rounding = 4e-2 if autocast else 2e-5
    assert of_tiles == pytest.approx(loss, rel=rounding) and difference(wanted, found) < rounding


def test_dropout_is_the_same_in_the_backward_as_in_the_forward() -> None:
    """Else a step along the gradient, in 64 bits, would change the loss by something else than the gradient says."""
    model = recomputed(with_lora(FAMILIES["llama"], torch.float64, lora_dropout=0.5), 8)
    for parameter in model.parameters():
        parameter.data = parameter.data.double()
    _, found = gradients(model)
    trained = {name: p for name, p in model.named_parameters() if "mlp" in name and p.requires_grad}
    random = torch.Generator().manual_seed(3)
    step = {name: 1e-5 * torch.randn(p.shape, generator=random, dtype=torch.float64) for name, p in trained.items()}
    losses = []
    for sign in (1, -2):
        for name, p in trained.items():
            p.data += sign * step[name]
        losses.append(float(loss_of(model).detach()))
    wanted = sum(float((found[name] * step[name]).sum()) for name in trained)
    assert (losses[0] - losses[1]) / 2 == pytest.approx(wanted, rel=1e-5)


class Watched(TorchDispatchMode):
    """The most rows of a tensor as wide as the MLP, and what all products computed."""

    rows, products = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for each in tree_leaves(out):
            if isinstance(each, Tensor) and each.ndim > 1 and each.shape[-1] == INNER:
                self.rows = max(self.rows, each.numel() // INNER)
        if func._overloadpacket in flop_registry:
            self.products += flop_registry[func._overloadpacket](*args, **(kwargs or {}), out_val=out)
        return out


def watched(tile: int | None) -> Watched:
    """A step with 200 tokens; weights as wide as the MLP have 64 rows at most."""
    model = recomputed(with_lora(FAMILIES["llama"]), tile)
    with Watched() as found:
        loss_of(model, TOKENS.repeat(1, 5)).backward()
    return found


def test_nothing_as_wide_as_the_mlp_is_there_of_all_tokens() -> None:
    assert [watched(tile).rows for tile in (None, 80, 100)] == [200, 100, 100]


def test_no_product_is_computed_more_often() -> None:
    assert watched(None).products == watched(80).products > 1e7


def test_layers_that_are_kept_and_short_packs_go_in_one_piece() -> None:
    model = with_lora(FAMILIES["llama"])
    lm = PackedLM(model, "documents")
    lm.recompute(1)
    assert [getattr(layer.mlp, SIZE, None) for layer in lm.layers] == [TILE, None]
    lm.recompute(2)
    lm.recompute(1)
    assert [getattr(layer.mlp, SIZE, None) for layer in lm.layers] == [TILE, None]
    assert [number_of(tokens, 8) for tokens in (1, 15, 16, 23, 24)] == [1, 1, 2, 2, 3] and number_of(1000, None) == 1
    assert [largest_tile(tokens, 8) for tokens in (7, 15, 16, 23)] == [7, 15, 8, 12]
    short, plain = with_lora(FAMILIES["llama"]), with_lora(FAMILIES["llama"])
    for each in (short, plain):
        use_kernels(each, "auto")
    go_in_tiles(short, 21)
    (_, wanted), (_, found) = gradients(plain), gradients(short)
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)
