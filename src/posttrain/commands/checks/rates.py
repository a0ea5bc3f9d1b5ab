"""What this device reaches: products of matrices, copies, and a training step beside both."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from posttrain.commands.checks.check import Check, Figures, Wrong, wait
from posttrain.commands.checks.kernels import dtypes
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.devices.device import Device
from posttrain.losses.tokens import token_loss
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.training.optimizer import make_optimizer

TIMES = 20
STEPS = 6
# layers, width, MLP, heads, words; four layers of Llama 3 8B's shape on a card
ON_CARD, ON_CPU = (4, 4096, 14336, 32, 4096), (2, 64, 192, 4, 512)
TOKENS = 8192  # of a step on a card
ANSWERS, NEW = 32, 64  # and the tokens of each


def quickest(device: torch.device, work: Callable[[], Any], times: int = TIMES) -> float:
    """Seconds, the best of several times."""
    best = float("inf")
    for _ in range(times):
        wait(device)
        began = time.perf_counter()
        work()
        wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def matmul_rate(device: torch.device, size: int, dtype: torch.dtype = torch.bfloat16) -> float:
    """Operations a second of a product of two square matrices."""
    a, b = (torch.randn(size, size, dtype=dtype, device=device) for _ in range(2))
    return 2.0 * size**3 / quickest(device, lambda: torch.mm(a, b))


def copy_rate(device: torch.device) -> float:
    """Bytes a second that are read and written by a copy."""
    x = torch.zeros(2**28 if device.type == "cuda" else 2**22, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    return 2.0 * x.numel() * x.element_size() / quickest(device, lambda: y.copy_(x))


def products(device: torch.device) -> Figures:
    """TFLOP/s in the formats of a run, and the share of the data sheet's where the card is known."""
    found: Figures = {}
    card = Device.at(device).card
    for dtype in dtypes(device):
        rate = matmul_rate(device, 8192 if device.type == "cuda" else 512, dtype)
        found[f"{str(dtype)[6:]} TFLOP/s"] = rate / 1e12
        if card:
            found[f"{str(dtype)[6:]} share of data sheet"] = rate / 1e12 / (card.single if dtype == torch.float32 else card.half)
    return found


def copies(device: torch.device) -> Figures:
    """GB/s, read and written together."""
    rate, card = copy_rate(device), Device.at(device).card
    return {"GB/s": rate / 1e9} | ({"share of data sheet": rate / 1e9 / card.bandwidth} if card else {})


def _random_model(device: torch.device) -> Any:
    """Its weights are frozen, and in the format that a run computes in."""
    layers, width, inner, heads, words = ON_CARD if device.type == "cuda" else ON_CPU
    config = LlamaConfig(
        vocab_size=words, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=max(1, heads // 4), tie_word_embeddings=False,
    )  # fmt: skip
    with torch.device(device):
        model: Any = LlamaForCausalLM(config)
    return model.to(dtypes(device)[-1]).requires_grad_(False)


def rollout(device: torch.device) -> Figures:
    """Tokens a second of answers whose every token is one recorded step, and of the growing cache, which it is tried against."""
    lm, sampling = PackedLM(_random_model(device)), Sampling(NEW, 1.0, 1.0, 0, ANSWERS)
    prompts, found = [list(range(1 + i, 33 + i)) for i in range(ANSWERS)], dict[str, float]()
    for name in ("tokens/s", "tokens/s of the growing cache"):
        sample(lm, prompts, 1, sampling, ends=[])  # tries, loads kernels
        if name == "tokens/s" and not lm.replays:
            raise Wrong(lm.report.warning)
        found[name] = ANSWERS * NEW / quickest(device, lambda: sample(lm, prompts, 1, sampling, ends=[]), 2)
        lm.replays = False
    return found


def training_step(device: torch.device) -> Figures:
    """Tokens a second of LoRA on a few layers with random weights. share of the limit: the time that the products it needs would
    take at the measured rate, of the time that it takes; nothing that is computed again counts as needed."""
    tokens = TOKENS if device.type == "cuda" else 256
    base, dtype = _random_model(device), dtypes(device)[-1]
    method = Lora(
        method="lora",
        init="default", init_rows=64, rank_pattern=None, alpha_pattern=None,
        r=16, alpha=32.0, dropout=0.0, targets="all-linear", dtype="float32", lr_factor=1.0, experts=True,
        router=False,
    )  # fmt: skip
    model = add_method(base, method)
    lm = PackedLM(model).train()
    optimizer, _ = make_optimizer("adamw", model, lambda _: 1.0, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    row = torch.randint(base.config.vocab_size, (tokens // 4,), generator=torch.Generator().manual_seed(0)).tolist()
    batch = pack(build([(row, [1.0] * len(row), i) for i in range(4)]), range(4)).to(device)

    def step() -> None:
        (token_loss(lm(batch), batch.weight).total / batch.loss_denominator).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # compiles, allocates
    seconds = quickest(device, step, STEPS)
    frozen = sum(p.numel() for name, p in model.named_parameters() if not p.requires_grad and "embed" not in name)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    needed = tokens * (4.0 * frozen + 6.0 * trained)
    limit = matmul_rate(device, 8192 if device.type == "cuda" else 512, dtype)
    return {"tokens/s": tokens / seconds, "share of the limit": needed / seconds / limit}


RATE_CHECKS = (
    Check("rate of products", products),
    Check("rate of copies", copies),
    Check("a training step", training_step),
    Check("a rollout", rollout, cards=1),
)
