"""What is alive at the worst moment of a step of QLoRA of 8B with all layers recomputed, counted on shapes alone.

Simulated: two layers of the model on the meta device, after each operator the storages that are alive; NF4's dense forms are made
where a run makes them, and products in one pass have their results alone, as Triton's kernels do.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from gpu_model import OF_WEIGHT, SHAPES, config_of, floor_bytes
from posttrain.batch import Segment
from posttrain.config.compose import compose_run
from posttrain.config.stages import typed_config
from posttrain.models.kernels import fused
from posttrain.models.kernels.logprobs import block, token_logprobs
from posttrain.models.kernels.masks import DocumentMask
from posttrain.models.language.activations import COUNTED, model_of_shapes
from posttrain.models.language.packed_lm import PackedLM

TOKENS, COUNTED_LAYERS, RANK = 2048, 2, 16


class Alive(TorchDispatchMode):
    """The most bytes of storages that were made inside and alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.there: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.there = {key: value for key, value in self.there.items() if not value[0].expired()}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.see(tensor, tensor.untyped_storage().nbytes())
        self.most = max(self.most, sum(size for _, size in self.there.values()))
        return out

    def see(self, tensor: Tensor, size: int) -> None:
        """Count a tensor's storage as so large, unless it is known."""
        weak = StorageWeakRef(tensor.untyped_storage())
        self.there.setdefault(weak.cdata, (weak, size))


def in_one_pass(grad: Tensor, gate: Tensor, up: Tensor, again: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    return torch.empty_like(gate), grad if again else torch.empty_like(up), torch.empty_like(gate) if again else None


def test_at_most_a_tenth_over_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    """In all 7.2 GB, where the floor, which has no NF4 layer in 16 bit and adapters in 16 bit, is 6.86."""
    shape = SHAPES["8b"]
    cfg: Any = typed_config(compose_run("sft", ["+peft=lora", "model=tiny", f"peft.r={RANK}"]))
    model = model_of_shapes(config_of("8b", num_hidden_layers=COUNTED_LAYERS), torch.bfloat16, cfg.peft)
    lm = PackedLM(model, kernels="auto").train()
    lm.causal.set_attn_implementation(COUNTED)
    lm.recompute(COUNTED_LAYERS)
    monkeypatch.setattr(fused, "dense_weight", lambda weight, state, dtype: torch.empty_like(weight, dtype=dtype))
    monkeypatch.setattr(fused, "silu_product", lambda gate, up: torch.empty_like(gate))
    monkeypatch.setattr(fused, "silu_product_backward", in_one_pass)
    with Alive() as alive, torch.device("meta"):
        for p in model.parameters():
            alive.see(p, 0)
        mask = DocumentMask((Segment(0, TOKENS),), TOKENS, torch.device("meta"))
        ids = torch.zeros(1, TOKENS, dtype=torch.int64)
        hidden = lm.hidden(ids, mask, input_ids=ids)
        target = torch.zeros(len(hidden), dtype=torch.int64)
        token_logprobs(hidden, target, lm.head, *block("cuda")).sum().backward()
    width, layers = shape["hidden_size"], shape["num_hidden_layers"]
    gradients = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    trained = gradients / 4 * layers / COUNTED_LAYERS
    linear = sum(p.numel() for n, p in model.named_parameters() if "proj" in n and not p.requires_grad) * layers / COUNTED_LAYERS
    working = alive.most + (layers - COUNTED_LAYERS) * 2 * TOKENS * width
    whole = OF_WEIGHT["nf4"] * linear + 4 * shape["vocab_size"] * width + trained * (4 + 4 + 2 + 2) + working  # factors joined
    floor = floor_bytes("8b", "nf4", RANK, TOKENS)
    assert floor and whole < 1.1 * floor
    assert working == pytest.approx(0.96e9, rel=0.05) and whole / floor == pytest.approx(1.05, abs=0.015)
