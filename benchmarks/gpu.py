"""A training step of a large random model on a GPU: tokens a second, share of the card's own matmul rate, peak memory.

python benchmarks/gpu.py [--shape 8b] [--quant none | --full] [--tokens 8192] [--documents 4] [--rank 16] [--recompute auto]
                         [--dense 0] [--peer trl | --rollout | --generate]
--rollout measures a rollout instead of a step: --new answers' tokens to each of --documents prompts, --tokens in all; --generate
the same by transformers' own `generate`. --peer: another tool instead of posttrain (gpu_peers.py). make bench-gpu runs all of
gpu_all.py, each in a process of its own, into one JSON. On a CPU: --shape toy or toy-moe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from posttrain.batch import PackedBatch
from posttrain.commands.checks.rates import copy_rate, matmul_rate
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.losses.tokens import token_loss
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.activations import activations, layers_to_recompute, model_of_shapes
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.models.peft.methods.none import Full
from posttrain.models.quantization.nf4 import keep_dense
from posttrain.training.optimizer import make_optimizer

LLAMA = {"architecture": "llama", "tie_word_embeddings": False}
MOE = {"architecture": "qwen3_moe", "head_dim": 128, "norm_topk_prob": True, "tie_word_embeddings": False}
SHAPES: dict[str, dict[str, Any]] = {
    "1b": {**LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "8b": {**LLAMA, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "30b-moe": {**MOE, "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
                "num_attention_heads": 32, "num_key_value_heads": 4, "num_experts": 128, "num_experts_per_tok": 8,
                "vocab_size": 151936},
    "65b": {**LLAMA, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 64, "vocab_size": 32000},
    "toy": {**LLAMA, "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1024},
    "toy-moe": {**MOE, "hidden_size": 64, "intermediate_size": 128, "moe_intermediate_size": 32, "num_hidden_layers": 2,
                "head_dim": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts": 8, "num_experts_per_tok": 2,
                "vocab_size": 1024},
}  # fmt: skip
WARM, TIMED = 2, 5


def config_of(shape: str, **other: Any) -> Any:
    """transformers' config of a shape."""
    settings = {**SHAPES[shape], **other}
    return AutoConfig.for_model(settings.pop("architecture"), **settings, max_position_embeddings=8192, pad_token_id=0)


def random_model(shape: str, quant: str, device: str, trained: bool = False) -> Any:
    """Layer by layer, so that no more than one of them is ever there in 16 bit on the way to NF4. trained: in float32."""
    config = config_of(shape)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    torch.set_default_dtype(torch.float32 if trained else torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = AutoModelForCausalLM.from_config(config)
        config.num_hidden_layers = layers
        with torch.device("meta"):
            kind = type(AutoModelForCausalLM.from_config(config_of(shape, num_hidden_layers=1)).model.layers[0])
        for i in range(layers):
            with torch.device(device):
                layer = kind(config, i)
                for weight in layer.parameters():  # experts have none of their own
                    if weight.ndim > 1:
                        weight.data.normal_(std=0.02)
            if quant == "nf4":
                _to_nf4(layer, device)
            model.model.layers.append(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    model.config.num_hidden_layers = layers
    model.is_loaded_in_4bit = quant == "nf4"
    return model.requires_grad_(trained)


def _to_nf4(layer: nn.Module, device: str) -> None:
    from bitsandbytes.nn.modules import Linear4bit, Params4bit

    for part in layer.children():
        for name, linear in list(part.named_children()):
            if isinstance(linear, nn.Linear):
                small = Linear4bit(
                    linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
                )
                dense: Any = linear.weight.data.cpu()
                small.weight = Params4bit(dense, requires_grad=False, quant_type="nf4", module=small)  # pyright: ignore
                setattr(part, name, small.to(device))


def random_batch(tokens: int, documents: int, vocabulary: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    length = tokens // documents
    rows = [(torch.randint(vocabulary, (length,), generator=generator).tolist(), [1.0] * length, i) for i in range(documents)]
    return pack(build(rows), range(documents))


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def recomputed(model: Any, method: Any, options: argparse.Namespace, device: str) -> int:
    """auto: by the same count as a run's own."""
    if options.recompute != "auto":
        return int(options.recompute)
    if device != "cuda":
        return 0
    kept = []
    for layers in (2, 1):
        config = config_of(options.shape, num_hidden_layers=layers)
        small = model_of_shapes(config, torch.bfloat16, method)
        kept.append(activations(small, options.tokens, options.documents).whole)
    inputs = 2.0 * options.tokens * SHAPES[options.shape]["hidden_size"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 12 * trained + head_bytes(model.get_output_embeddings().weight, options.tokens, device)
    free = 0.9 * torch.cuda.mem_get_info()[0]
    return layers_to_recompute(free, fixed, kept[0] - kept[1], inputs, SHAPES[options.shape]["num_hidden_layers"])


def adapted(options: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """The model with LoRA as posttrain puts it there, not on fused experts; with --full all of it, in float32."""
    if options.full:
        method: Any = Full.model_construct(method="none")
        return random_model(options.shape, "none", device, trained=True), method
    method = Lora(
        method="lora", r=options.rank, alpha=2.0 * options.rank, dropout=0.0, targets="all-linear", dtype="float32",
        lr_factor=1.0, experts=False, router=False,
    )  # fmt: skip
    return add_method(random_model(options.shape, options.quant, device), method), method


def run_ours(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """share_of_matmul_rate: of the products that a step needs, nothing computed again counted."""
    model, method = adapted(options, device)
    lm = PackedLM(model).train()
    if options.dense:
        keep_dense(lm.layers[: options.dense])
    layers = recomputed(model, method, options, device)
    if layers:
        lm.recompute(layers)
    name = "paged_adamw_8bit" if options.quant == "nf4" else "adamw"
    optimizer, _ = make_optimizer(name, model, lambda _: 1.0, lr=1e-4, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0)
    batch = random_batch(options.tokens, options.documents, SHAPES[options.shape]["vocab_size"]).to(device)

    def step() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=options.full and device == "cuda"):
            loss = token_loss(lm(batch), batch.weight).total / batch.loss_denominator
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    seconds = timed(step, device)
    rate = matmul_rate(torch.device(device), 8192 if device == "cuda" else 1024)
    return {
        **speed(options.tokens, seconds),
        "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": options.tokens * needed(model, options.shape) / statistics.median(seconds) / rate,
        "layers_recomputed": layers,
        "peak_gb": peak(device),
    }


def timed(step: Callable[[], Any], device: str) -> list[float]:
    """Seconds of each step, after some that warm up."""
    seconds: list[float] = []
    for number in range(WARM + TIMED):
        _wait(device)
        began = time.perf_counter()
        step()
        _wait(device)
        if number >= WARM:
            seconds.append(time.perf_counter() - began)
    return seconds


def speed(tokens: int, seconds: list[float]) -> dict[str, Any]:
    """Tokens a second of the median step, and of the slowest and the fastest."""
    return {
        "tokens_per_second": tokens / statistics.median(seconds),
        "spread": [tokens / max(seconds), tokens / min(seconds)],
    }


def peak(device: str) -> float | None:
    """The most memory, in GB."""
    return torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None


def needed(model: Any, shape: str) -> float:
    """Operations of products that a token needs: 2 a number forward and 2 backward through it, 2 more where it is trained. Of
    experts those that a token goes to; the embedding is none."""
    settings, found = SHAPES[shape], 0.0
    share = settings["num_experts_per_tok"] / settings["num_experts"] if "num_experts" in settings else 1.0
    for name, p in model.named_parameters():
        if "embed_tokens" in name or _numbers(p) == max(p.shape, default=0):  # a norm's
            continue
        found += (6.0 if p.requires_grad else 4.0) * _numbers(p) * (share if ".experts." in name else 1.0)
    return found


def run_rollout(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """floor_share: of the time in which the card's memory could be read as often as there are steps, weights alone (bandwidth as
    measured by copying)."""
    model, _ = adapted(options, device)
    batch = random_batch(options.tokens, options.documents, SHAPES[options.shape]["vocab_size"])
    prompts = batch.tokens.view(options.documents, -1)
    lm = PackedLM(model).eval()
    seconds = []
    for _ in range(WARM + 1):
        _wait(device)
        began = time.perf_counter()
        if options.generate:
            with torch.no_grad():
                model.generate(
                    input_ids=prompts.to(device), max_new_tokens=options.new, min_new_tokens=options.new, do_sample=True, top_k=0,
                    pad_token_id=0,
                )  # fmt: skip
        else:
            sample(lm, prompts.tolist(), 1, Sampling(options.new, 1.0, 1.0, 0, options.documents), ends=[])
        _wait(device)
        seconds.append(time.perf_counter() - began)
    embedding = model.get_input_embeddings().weight
    weights = sum(p.numel() * p.element_size() for p in model.parameters() if p is not embedding)
    return {
        "tokens_per_second": options.documents * options.new / min(seconds),
        "floor_share": options.new * weights / copy_rate(torch.device(device)) / min(seconds),
        "peak_gb": peak(device),
    }


def _numbers(p: torch.Tensor) -> int:
    state = getattr(p, "quant_state", None)
    return state.shape.numel() if state is not None else p.numel()


def main() -> None:
    from gpu_peers import PEERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none")
    parser.add_argument("--full", action="store_true", help="every weight is trained, in float32")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="auto", help="layers, or auto")
    parser.add_argument("--dense", type=int, default=0, help="layers whose NF4 weights have a dense copy")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peer", choices=list(PEERS), help="another tool instead of posttrain")
    what.add_argument("--rollout", action="store_true", help="a rollout instead of a step")
    what.add_argument("--generate", action="store_true", help="the same by transformers' generate")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if options.quant == "nf4" and "moe" in options.shape:
        parser.error("--quant nf4: fused experts are not quantized here; say --quant none")
    run = PEERS[options.peer] if options.peer else run_rollout if options.rollout or options.generate else run_ours
    found = run(options, device)
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    contender = options.peer or ("transformers" if options.generate else "posttrain")
    print(json.dumps({"device": card, "contender": contender, **vars(options), **found}))


if __name__ == "__main__":
    main()
