"""A training step of a large random model on a GPU: tokens a second, share of the card's own matmul rate, peak memory.

python benchmarks/gpu.py [--shape 8b] [--stage sft] [--quant none | --full] [--tokens 8192] [--documents 4] [--rank 16]
                         [--recompute auto] [--offload none] [--dense 0] [--cap 24]
                         [--peer trl | --rollout | --generate | --longest 131072]
--rollout measures a rollout instead of a step: --new answers' tokens to each of --documents prompts, --tokens in all; --generate
the same by transformers' own `generate`. --peer: another tool instead of posttrain (gpu_peers.py). --longest looks for the
longest context that a step fits of, up to so many tokens, all layers recomputed. --cap: as on a card of so many GB. make
bench-gpu runs all of gpu_all.py, each in a process of its own, into one JSON. On a CPU: --shape toy or toy-moe.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gpu_limits import cap, free_bytes, longest
from gpu_model import SHAPES, config_of, floor_bytes, needed, random_model, share_of_rate
from posttrain.batch import PackedBatch
from posttrain.commands.checks.rates import copy_rate, matmul_rate
from posttrain.data.collate import pack, pack_pairs
from posttrain.data.examples import build
from posttrain.losses.pairs import margins
from posttrain.losses.policy.ppo import ppo
from posttrain.losses.surrogates import Sampled
from posttrain.losses.tokens import answer_sums, token_loss
from posttrain.models.kernels.logprobs import head_bytes
from posttrain.models.language.activations import activations, model_of_shapes
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.packed_lm import PackedLM
from posttrain.models.language.reward_model import PackedScorer
from posttrain.models.language.room import Layers
from posttrain.models.offload.activations import check_offload
from posttrain.models.peft.attach import add_method
from posttrain.models.peft.methods.lora import Lora
from posttrain.models.peft.methods.none import Full
from posttrain.models.quantization.nf4 import keep_dense
from posttrain.training.optimizer import make_optimizer

WARM, TIMED = 2, 5


def random_batch(tokens: int, documents: int, vocabulary: int) -> PackedBatch:
    generator = torch.Generator().manual_seed(0)
    length = tokens // documents
    rows = [(torch.randint(vocabulary, (length,), generator=generator).tolist(), [1.0] * length, i) for i in range(documents)]
    return pack(build(rows), range(documents))


def random_pairs(tokens: int, pairs: int, vocabulary: int) -> PackedBatch:
    """Of each pair's tokens half are the prompt, which is there once, and a quarter each answer."""
    generator = torch.Generator().manual_seed(0)
    half, quarter = tokens // pairs // 2, tokens // pairs // 4
    rows, weights = (
        torch.randint(vocabulary, (pairs, half + 2 * quarter), generator=generator),
        [0.0] * half + [1.0] * 2 * quarter,
    )
    made = build([(row, weights, i) for i, row in enumerate(rows.tolist())], splits=[(half, half + quarter)] * pairs)
    return pack_pairs(made, range(pairs))


def _dpo(logps: Tensor, batch: PackedBatch) -> Tensor:
    """Against a reference of zeros: what it says does not change the work."""
    sums = answer_sums(logps, batch.sequence_id, batch.num_answers)
    return -logsigmoid(0.1 * margins(sums)).sum()


def _rm(scores: Tensor, batch: PackedBatch) -> Tensor:
    return -logsigmoid(margins(scores)).sum()


def _ppo(logps: Tensor, batch: PackedBatch) -> Tensor:
    """The first update after a rollout, every other answer better than its group."""
    advantages = 1.0 - 2.0 * (batch.sequence_id % 2)
    return ppo(Sampled(logps, logps.detach(), advantages, batch.sequence_id), low=0.2, high=0.2)[0].sum()


LOSSES: dict[str, Callable[[Tensor, PackedBatch], Tensor]] = {
    "sft": lambda logps, batch: token_loss(logps, batch.weight).total, "dpo": _dpo, "rm": _rm, "ppo": _ppo,
}  # fmt: skip


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def recomputed(model: Any, method: Any, options: argparse.Namespace, device: str) -> int:
    """auto: by the same count as a run's own; all where activations go, or a long context is looked for."""
    if options.recompute != "auto":
        return int(options.recompute)
    if options.offload != "none" or options.longest:
        return SHAPES[options.shape]["num_hidden_layers"]
    if device != "cuda":
        return 0
    kept = []
    for layers in (2, 1):
        config = config_of(options.shape, num_hidden_layers=layers)
        small = model_of_shapes(config, torch.bfloat16, method)
        kept.append(activations(small, options.tokens, options.documents))
    inputs = 2.0 * options.tokens * SHAPES[options.shape]["hidden_size"]
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    fixed = 12 * trained + head_bytes(model.get_output_embeddings().weight, options.tokens, device)
    whole, narrow = kept[0].whole - kept[1].whole, kept[0].narrow - kept[1].narrow
    layers = Layers.of(whole, narrow, inputs, SHAPES[options.shape]["num_hidden_layers"], options.tokens)
    return layers.to_recompute(0.9 * free_bytes(options.cap) - fixed)


def adapted(options: argparse.Namespace, device: str) -> tuple[Any, Any]:
    """The model with LoRA as posttrain puts it there, not on fused experts; with --full all of it, in float32."""
    if options.full:
        method: Any = Full.model_construct(method="none")
        return random_model(options.shape, "none", device, trained=True), method
    method = Lora(
        method="lora",
        init="default", init_rows=64, rank_pattern=None, alpha_pattern=None,
        r=options.rank, alpha=2.0 * options.rank, dropout=0.0, targets="all-linear", dtype="float32",
        lr_factor=1.0, experts=False, router=False,
    )  # fmt: skip
    return add_method(random_model(options.shape, options.quant, device), method), method


class Ours:
    """posttrain's model and optimizer as the options say."""

    def __init__(self, options: argparse.Namespace, device: str) -> None:
        check_offload(options.offload, torch.device(device))
        self.options, self.device = options, device
        self.model, method = adapted(options, device)
        self.lm = (PackedScorer if options.stage == "rm" else PackedLM)(self.model).train()
        self.lm.sends_away = options.offload == "activations"
        if options.dense:
            keep_dense(self.lm.layers[: options.dense])
        self.layers = recomputed(self.model, method, options, device)
        if self.layers:
            self.lm.recompute(self.layers)
        name, rates = "paged_adamw_8bit" if options.quant == "nf4" else "adamw", {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8}
        self.optimizer, _ = make_optimizer(name, self.model, lambda _: 1.0, **rates, weight_decay=0.0)

    def batch(self, tokens: int, documents: int) -> PackedBatch:
        """Of the stage's kind."""
        make = random_batch if self.options.stage == "sft" else random_pairs
        return make(tokens, documents, SHAPES[self.options.shape]["vocab_size"]).to(self.device)

    def step(self, batch: PackedBatch) -> None:
        """Forward, backward and the optimizer."""
        with torch.autocast(self.device, torch.bfloat16, enabled=self.options.full and self.device == "cuda"):
            loss = LOSSES[self.options.stage](self.lm(batch), batch)
        (loss / batch.loss_denominator).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def run_ours(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """share_of_matmul_rate: of the products that a step needs, nothing computed again counted."""
    ours = Ours(options, device)
    if device == "cuda":  # a layer in 16 bit on its way to NF4 is no part of a step
        torch.cuda.reset_peak_memory_stats()
    batch = ours.batch(options.tokens, options.documents)
    seconds = timed(lambda: ours.step(batch), device)
    rate = matmul_rate(torch.device(device), 8192 if device == "cuda" else 1024)
    predictions = 0 if options.stage == "rm" else len(batch.target)
    needs = needed(ours.model, options.shape)
    floor = None if options.full else floor_bytes(options.shape, options.quant, options.rank, options.tokens)
    return {
        **speed(options.tokens, seconds),
        "matmul_tflops": rate / 1e12,
        "share_of_matmul_rate": share_of_rate(options.tokens, predictions, needs, statistics.median(seconds), rate),
        "layers_recomputed": ours.layers,
        "peak_gb": peak(device),
        "floor_gb": floor and floor / 1e9,
    }


def run_longest(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """longest_tokens: of one document that a step fits of."""
    ours = Ours(options, device)
    found = longest(lambda tokens: ours.step(ours.batch(tokens, 1)), ours.optimizer.zero_grad, options.longest)
    return {"longest_tokens": found, "layers_recomputed": ours.layers}


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


def measure(words: list[str]) -> dict[str, Any]:
    """What the command line of these words measures."""
    from gpu_peers import PEERS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=list(SHAPES), default="8b")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none")
    parser.add_argument("--stage", choices=list(LOSSES), default="sft", help="whose loss; of ppo an update")
    parser.add_argument("--full", action="store_true", help="every weight is trained, in float32")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--documents", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--recompute", default="auto", help="layers, or auto")
    parser.add_argument("--dense", type=int, default=0, help="layers whose NF4 weights have a dense copy")
    parser.add_argument("--new", type=int, default=128, help="tokens of an answer")
    parser.add_argument("--offload", choices=["none", "activations"], default="none", help="as train.offload")
    parser.add_argument("--cap", type=float, default=None, help="GB of the card that is to be had, as on a smaller one")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--peer", choices=list(PEERS), help="another tool instead of posttrain")
    what.add_argument("--rollout", action="store_true", help="a rollout instead of a step")
    what.add_argument("--generate", action="store_true", help="the same by transformers' generate")
    what.add_argument("--longest", type=int, default=0, help="the longest context that fits, up to so many tokens")
    options = parser.parse_args(words)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    if options.quant == "nf4" and "moe" in options.shape:
        parser.error("--quant nf4: fused experts are not quantized here; say --quant none")
    if options.peer and options.stage != "sft":
        parser.error("--peer: the others are asked for sft alone; say --stage sft")
    if options.cap is not None:
        cap(options.cap)
    own = run_rollout if options.rollout or options.generate else run_longest if options.longest else run_ours
    found = (PEERS[options.peer] if options.peer else own)(options, device)
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    contender = options.peer or ("transformers" if options.generate else "posttrain")
    return {"device": card, "contender": contender, **vars(options), **found}


def main() -> None:
    print(json.dumps(measure(sys.argv[1:])))


if __name__ == "__main__":
    main()
