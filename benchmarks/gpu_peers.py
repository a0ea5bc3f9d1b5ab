"""The other tools of benchmarks/gpu.py, each with the best flags that it has for one card, on the same shapes and rows.

TRL with its defaults, and with liger-kernel and FlashAttention; Unsloth; torchtune. Each is asked for only where it is installed;
where it is not, SystemExit says so. TRL was run on a CPU; the others, and its best flags, have not been seen to run.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch

from gpu import TIMED, WARM, _wait, peak, random_batch, speed, timed
from gpu_model import SHAPES, random_model
from posttrain.devices.out_of_memory import give_back
from posttrain.errors import is_out_of_memory

NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RATE = 1e-4  # of learning; what is learnt of random rows does not matter


def require(module: str, peer: str) -> Any:
    """SystemExit where it is not installed."""
    if find_spec(module) is None:
        raise SystemExit(f"{peer}: {module} is not installed")
    return import_module(module)


def run_trl(options: argparse.Namespace, device: str, attention: str | None = None, **best: Any) -> dict[str, Any]:
    """TRL's SFTTrainer with its defaults on the same model and rows, a row a document. attention: the model's, for TRL itself
    sets none of a model that is there already."""
    from peft import LoraConfig

    lora = LoraConfig(r=options.rank, lora_alpha=2 * options.rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = random_model(options.shape, options.quant, device, trained=options.full)
    if attention:
        model.set_attn_implementation(attention)
    return _by_trainer(model, None if options.full else lora, options, device, **best)


def run_trl_best(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """With liger-kernel and bfloat16, without recomputation where it fits; padding-free batches by FlashAttention where it is
    installed, else torch's own attention, which has FlashAttention inside (rows are of one length, so that nothing is padded)."""
    require("liger_kernel", "trl-best")
    flags: dict[str, Any] = {"use_liger_kernel": True, "bf16": True}
    attention = "sdpa"
    if find_spec("flash_attn"):
        attention, flags = "flash_attention_2", flags | {"padding_free": True}
    try:
        found = run_trl(options, device, attention=attention, gradient_checkpointing=False, **flags) | {"recomputes": False}
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        found = {}
    if not found:  # outside of the handler, where nothing holds what the failed run has kept
        give_back()
        found = run_trl(options, device, attention=attention, **flags) | {"recomputes": True}
    return found | {"attention": attention}


def run_unsloth(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """FastLanguageModel on the same weights, written to a directory first: it loads from one."""
    unsloth = require("unsloth", "unsloth")
    with tempfile.TemporaryDirectory() as folder:
        from posttrain.models.language.tokenizer import load_tokenizer

        random_model(options.shape, "none", device).save_pretrained(folder)
        give_back()
        load_tokenizer("tiny", None, None, None).save_pretrained(folder)
        four_bit = options.quant == "nf4"
        model, _ = unsloth.FastLanguageModel.from_pretrained(
            folder, max_seq_length=options.tokens, load_in_4bit=four_bit, dtype=torch.bfloat16, full_finetuning=options.full
        )
        if not options.full:
            settings = {"r": options.rank, "lora_alpha": 2 * options.rank, "lora_dropout": 0, "target_modules": NAMES}
            model = unsloth.FastLanguageModel.get_peft_model(model, **settings, use_gradient_checkpointing="unsloth")
        return _by_trainer(model, None, options, device, bf16=True)


def _by_trainer(model: Any, lora: Any, options: argparse.Namespace, device: str, **other: Any) -> dict[str, Any]:
    """Tokens a second of TRL's trainer, of the steps after those that warm up."""
    from datasets import Dataset
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
            output_dir=out, per_device_train_batch_size=options.documents, max_steps=WARM + TIMED, logging_steps=1,
            save_strategy="no", report_to=[], max_length=options.tokens, disable_tqdm=True, use_cpu=device != "cuda", **other,
        )  # fmt: skip
        SFTTrainer(
            model=model, args=config, train_dataset=Dataset.from_list(rows),
            processing_class=load_tokenizer("tiny", None, None, None), peft_config=lora, callbacks=[Clock()],
        ).train()  # fmt: skip
    return {**speed(options.tokens, seconds[WARM:]), "peak_gb": peak(device)}


def run_torchtune(options: argparse.Namespace, device: str) -> dict[str, Any]:
    """Its own Llama with LoRA or QLoRA, recomputed and compiled as its recipes for one card have it."""
    require("torchtune", "torchtune")
    shape = SHAPES[options.shape]
    if shape["architecture"] != "llama":
        raise SystemExit("torchtune: only Llama's shapes are built here")
    llama = import_module("torchtune.models.llama3_1")
    parts = {"vocab_size": shape["vocab_size"], "num_layers": shape["num_hidden_layers"], "embed_dim": shape["hidden_size"],
             "num_heads": shape["num_attention_heads"], "num_kv_heads": shape["num_key_value_heads"], "max_seq_len": 8192,
             "intermediate_dim": shape["intermediate_size"]}  # fmt: skip
    lora = {"lora_attn_modules": ["q_proj", "k_proj", "v_proj", "output_proj"], "apply_lora_to_mlp": True,
            "lora_rank": options.rank, "lora_alpha": 2 * options.rank, "quantize_base": options.quant == "nf4"}  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = llama.llama3_1(**parts) if options.full else llama.lora_llama3_1(**parts, **lora)
    torch.set_default_dtype(torch.float32)
    if not options.full:
        peft = import_module("torchtune.modules.peft")
        peft.set_trainable_params(model, peft.get_adapter_params(model))
    checkpointing = import_module("torchtune.training").set_activation_checkpointing
    checkpointing(model, auto_wrap_policy={import_module("torchtune.modules").TransformerSelfAttentionLayer})
    loss: Any = import_module("torchtune.modules.loss").CEWithChunkedOutputLoss()
    model.set_num_output_chunks(loss.num_output_chunks)
    model.compile()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=RATE, fused=device == "cuda")
    tokens = random_batch(options.tokens, options.documents, shape["vocab_size"]).tokens.view(options.documents, -1).to(device)
    targets = torch.cat([tokens[:, 1:], torch.full_like(tokens[:, :1], loss.ignore_index)], dim=1)

    def step() -> None:
        loss(model(tokens), targets).backward()
        optimizer.step()
        optimizer.zero_grad()

    return {**speed(options.tokens, timed(step, device)), "peak_gb": peak(device)}


PEERS: dict[str, Callable[..., dict[str, Any]]] = {
    "trl": run_trl, "trl-best": run_trl_best, "unsloth": run_unsloth, "torchtune": run_torchtune,
}  # fmt: skip
