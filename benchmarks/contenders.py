"""One measured run of one contender, in a process of its own: prints a JSON line with seconds, losses and peak memory.

python benchmarks/contenders.py NAME STAGE ROWS MODEL_DIRECTORY [BATCH] [RANK]
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BEGAN = time.perf_counter()
NEW_TOKENS = 48  # of an answer in ppo
# What each name means for TRL: the dtype the weights are loaded in, and the flags that differ from TRL's own defaults.
# Packing without padding and padding-free are not among them: both ask for FlashAttention, which is not to be had on a CPU.
BEST: dict[str, dict[str, Any]] = {
    "cpt": {"packing": True, "packing_strategy": "wrapped"},
    "sft": {"train_sampling_strategy": "group_by_length"},
    "dpo": {"precompute_ref_log_probs": True},
    "rm": {},
}


def lora(rank: int, task: str = "CAUSAL_LM") -> dict[str, Any]:
    return {"r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", "task_type": task}


def run_trl(name: str, stage: str, rows: Path, model_dir: str, batch: int, rank: int) -> dict[str, Any]:
    import torch
    import trl
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback

    best = name == "trl_best"
    kind = {"cpt": "SFT", "sft": "SFT", "dpo": "DPO", "rm": "Reward"}[stage]
    config, trainer = getattr(trl, f"{kind}Config"), getattr(trl, f"{kind}Trainer")
    steps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        flags = BEST[stage] | {"gradient_checkpointing": False} if best else {}
        arguments = config(
            output_dir=out, per_device_train_batch_size=batch, num_train_epochs=1, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(), learning_rate=1e-4, max_length=1024, seed=0, disable_tqdm=True,
            lr_scheduler_type="constant", **flags,
        )  # fmt: skip
        data = load_dataset("json", data_files=str(rows), split="train")
        if stage == "sft":
            data = data.map(lambda r: {"prompt": r["messages"][:1], "completion": r["messages"][1:]}, remove_columns=["messages"])
        dtype, task = torch.bfloat16 if best else torch.float32, "SEQ_CLS" if stage == "rm" else "CAUSAL_LM"
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        if stage == "rm":
            model: Any = AutoModelForSequenceClassification.from_pretrained(model_dir, num_labels=1, dtype=dtype)
            tokenizer.pad_token = "<|endoftext|>"
            model.config.pad_token_id = tokenizer.pad_token_id
        else:
            model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype)
        job = trainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer,
            peft_config=LoraConfig(**lora(rank, task)), callbacks=[Clock()],
        )  # fmt: skip
        job.train()
        job.save_model(out)
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    return {"steps": sum(steps), "loss": sum(losses) / len(losses)}


def run_posttrain(name: str, stage: str, rows: Path, model_dir: str, batch: int, rank: int) -> dict[str, Any]:
    """name: posttrain for its defaults, posttrain_spare for what takes the least memory."""
    import posttrain

    recompute = "true" if name == "posttrain_spare" else "auto"
    words = {"train.epochs=1"} if stage != "ppo" else {
        "train.max_steps=2", f"rollout.max_new_tokens={NEW_TOKENS}", "ppo.minibatches=2", "ppo.epochs=2", "ppo.stop_kl=null",
        "reward.function=posttrain.rewards:code_spans", "data.eval_rows=0", "data.shape=messages",
    }  # fmt: skip
    accumulation = 2 if stage == "ppo" else 1
    with tempfile.TemporaryDirectory() as out:
        manifest = posttrain.run(
            stage, "+peft=lora", f"model.name={model_dir}", f"peft.r={rank}", f"peft.alpha={2 * rank}", f"data.path={rows}",
            "data.eval_share=0", "eval.sets=null", f"train.batch_size={batch}", f"train.grad_accum={accumulation}",
            "train.max_length=1024", "train.save_steps=null", "optim.lr=1e-4", "optim.schedule=constant",
            "optim.warmup_ratio=0", f"run.dir={out}/run", f"train.gradient_checkpointing={recompute}", *words,
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    found = {"steps": manifest["seconds"], "loss": sum(losses) / len(losses), "tokens": manifest["tokens"]}
    for rate in ("rollout_tokens_per_second", "update_tokens_per_second"):
        if rates := [line[f"train/{rate}"] for line in lines if f"train/{rate}" in line]:
            found[rate] = sum(rates) / len(rates)
    if stage == "sft":
        trained = manifest["data"][0]["trained_tokens"]
        found["floor_share"] = needed_flops(model_dir, manifest, trained) / (matmul_rate(model_dir) * manifest["seconds"])
    return found


def needed_flops(model_dir: str, manifest: dict[str, Any], trained_tokens: int) -> float:
    """Of a step with a frozen base and nothing computed twice: 4 for every number of the body a token, 6 for one of the adapters,
    4 for the head's where a token counts. Attention's own products are left out."""
    config = json.loads((Path(model_dir) / "config.json").read_text())
    head = config["vocab_size"] * config["hidden_size"]
    adapters = manifest["trainable"]["trained"]
    body = manifest["trainable"]["total"] - adapters - head
    return manifest["tokens"] * (4.0 * body + 6.0 * adapters) + trained_tokens * 4.0 * head


def matmul_rate(model_dir: str, tokens: int = 1024) -> float:
    """FLOP/s of the model's own widest products in bfloat16: the best of several."""
    import torch

    config = json.loads((Path(model_dir) / "config.json").read_text())
    x = torch.randn(tokens, config["hidden_size"], dtype=torch.bfloat16)
    weight = torch.randn(config["intermediate_size"], config["hidden_size"], dtype=torch.bfloat16)
    best = float("inf")
    for _ in range(40):
        began = time.perf_counter()
        torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - began)
    return 2.0 * x.numel() * weight.shape[0] / best


def main() -> None:
    name, stage, rows, model_dir = sys.argv[1:5]
    batch, rank = (int(word) for word in (*sys.argv[5:], "4", "8")[:2])
    arguments = (Path(rows), model_dir, batch, rank)
    if name.startswith("posttrain"):
        found = run_posttrain(name, stage, *arguments)
    elif stage == "ppo":
        from plain_ppo import run_plain_ppo

        found = run_plain_ppo(name, *arguments, NEW_TOKENS)
    else:
        found = run_trl(name, stage, *arguments)
    found |= {"whole": time.perf_counter() - BEGAN, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
