"""A training step of a large random model on a GPU: tokens a second, share of the card's own matmul rate, peak memory.

python benchmarks/gpu.py [--shape 8b] [--quant none] [--tokens 8192] [--documents 4] [--rank 16] [--recompute auto] [--dense 0]
                         [--trl | --rollout | --generate]
--rollout measures a rollout instead of a step: --new answers' tokens to each of --documents prompts, --tokens in all; --generate
the same by transformers' own `generate`. make bench-gpu runs 8b in bfloat16 and in NF4, both beside TRL, NF4 with dense copies,
the rollout beside `generate`, and 65b in NF4. On a CPU: --shape toy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from posttrain.batch import PackedBatch
from posttrain.data.collate import pack
from posttrain.data.examples import build
from posttrain.losses.tokens import token_loss
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.activations import activations, layers_to_recompute, model_of_shapes
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.models.quantization.nf4 import keep_dense
from posttrain.training.optimizer import make_optimizer

SHAPES: dict[str, dict[str, Any]] = {
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
           "num_key_value_heads": 8, "vocab_size": 128256},
    "65b": {"hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 80, "num_attention_heads": 64,
            "num_key_value_heads": 64, "vocab_size": 32000},
    "toy": {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4,
            "num_key_value_heads": 2, "vocab_size": 1024},
}  # fmt: skip
WARM, TIMED = 2, 5


def random_model(shape: str, quant: str, device: str) -> Any:
    """Layer by layer, so that no more than one of them is ever there in 16 bit on the way to NF4."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=8192, tie_word_embeddings=False)
    layers = config.num_hidden_layers
    config.num_hidden_layers = 0
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model: Any = LlamaForCausalLM(config)
        for i in range(layers):
            with torch.device(device):
                layer = LlamaDecoderLayer(config, i)
            if quant == "nf4":
                _to_nf4(layer, device)
            model.model.layers.append(layer)
    finally:
        torch.set_default_dtype(torch.float32)
    config.num_hidden_layers = layers
    model.config.num_hidden_layers = layers
    model.is_loaded_in_4bit = quant == "nf4"
    return model.requires_grad_(False)


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


def matmul_rate(device: str, size: int) -> float:
    a, b = (torch.randn(size, size, dtype=torch.bfloat16, device=device) for _ in range(2))
    return 2.0 * size**3 / _quickest(device, lambda: torch.mm(a, b))


def copy_rate(device: str) -> float:
    """Bytes a second that are read and written by a copy."""
    x = torch.zeros(2**28 if device == "cuda" else 2**24, dtype=torch.float32, device=device)
    y = torch.empty_like(x)
    return 2.0 * x.numel() * x.element_size() / _quickest(device, lambda: y.copy_(x))


def _quickest(device: str, work: Callable[[], Any]) -> float:
    """Seconds, the best of several times."""
    best = float("inf")
    for _ in range(20):
        _wait(device)
        began = time.perf_counter()
        work()
        _wait(device)
        best = min(best, time.perf_counter() - began)
    return best


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def recomputed(model: Any, method: Lora, options: argparse.Namespace, device: str) -> int:
    """auto: by the same count as a run's own."""
    if options.recompute != "auto":
        return int(options.recompute)
    if device != "cuda":
        return 0
    kept = []
    for layers in (2, 1):
        config = LlamaConfig(**{**SHAPES[options.shape], "num_hidden_layers": layers}, tie_word_embeddings=False)
        small = model_of_shapes(config, torch.bfloat16, method)
        kept.append(activations(small, options.tokens, options.documents).whole)
    inputs = 2.0 * options.tokens * SHAPES[options.shape]["hidden_size"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 12 * trained + head_bytes(model.get_output_embeddings().weight, options.tokens, device)
    free = 0.9 * torch.cuda.mem_get_info()[0]
    return layers_to_recompute(free, fixed, kept[0] - kept[1], inputs, SHAPES[options.shape]["num_hidden_layers"])


def adapted(options: argparse.Namespace, device: str) -> tuple[Any, Lora]:
    """The model with LoRA as posttrain puts it there."""
    method = Lora(
        method="lora", r=options.rank, alpha=2.0 * options.rank, dropout=0.0, targets="all-linear", dtype="float32",
        lr_factor=1.0, experts=True, router=False,
    )  # fmt: skip
    return add_method(random_model(options.shape, options.quant, device), method), method


def run_ours(options: argparse.Namespace, device: str) -> dict[str, Any]:
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
    body = sum(_numbers(p) for n, p in model.named_parameters() if not p.requires_grad and "layers" in n)
    adapters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    head = SHAPES[options.shape]["vocab_size"] * SHAPES[options.shape]["hidden_size"]
    seconds = []
    for step in range(WARM + TIMED):
        _wait(device)
        began = time.perf_counter()
        (token_loss(lm(batch), batch.weight).total / batch.loss_denominator).backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        if step >= WARM:
            seconds.append(time.perf_counter() - began)
    needed = options.tokens * (4.0 * (body + head) + 6.0 * adapters)
    rate = matmul_rate(device, 8192 if device == "cuda" else 1024)
    return {
        "tokens_per_second": options.tokens / min(seconds),
        "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": needed / min(seconds) / rate,
        "layers_recomputed": layers,
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


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
        "floor_share": options.new * weights / copy_rate(device) / min(seconds),
        "peak_gb": torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None,
    }


def _numbers(p: torch.Tensor) -> int:
    state = getattr(p, "quant_state", None)
    return state.shape.numel() if state is not None else p.numel()


def run_trl(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """TRL's SFTTrainer with its defaults on the same model and rows, a row a document."""
    import tempfile

    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    from posttrain.models.language.tokenizer import load_tokenizer

    seconds: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            _wait(device)
            seconds.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            _wait(device)
            seconds[-1] += time.perf_counter()

    batch = random_batch(options.tokens, options.documents, 256)
    rows = [{"input_ids": row} for row in batch.tokens.view(options.documents, -1).tolist()] * (WARM + TIMED)
    with tempfile.TemporaryDirectory() as out:
        config = SFTConfig(
            output_dir=out,
            per_device_train_batch_size=options.documents,
            max_steps=WARM + TIMED,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            max_length=options.tokens,
            disable_tqdm=True,
            use_cpu=device != "cuda",
        )
        lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
        SFTTrainer(
            model=random_model(options.shape, options.quant, device), args=config, train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer("tiny", None, None, None), peft_config=lora, callbacks=[Clock()],
        ).train()  # fmt: skip
    peak = torch.cuda.max_memory_allocated() / 1e9 if device == "cuda" else None
    return {"tokens_per_second": options.tokens / min(seconds[WARM:]), "peak_gb": peak}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="auto", help="layers, or auto")
    parser.add_argument("--dense", type=int, default=0, help="layers whose NF4 weights have a dense copy")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--trl", action="store_true", help="TRL instead of posttrain")
    what.add_argument("--rollout", action="store_true", help="a rollout instead of a step")
    what.add_argument("--generate", action="store_true", help="the same by transformers' generate")
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    run = run_trl if options.trl else run_rollout if options.rollout or options.generate else run_ours
    found = run(options, device)
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    contender = "trl" if options.trl else "transformers" if options.generate else "posttrain"
    print(json.dumps({"device": card, "contender": contender, **vars(options), **found}))


if __name__ == "__main__":
    main()
