"""One measured run of one contender, in a process of its own: prints a JSON line with seconds, tokens, losses and peak memory.

python benchmarks/contenders.py NAME STAGE ROWS MODEL_DIRECTORY
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

BATCH = 4
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# What each name means for TRL: the dtype the weights are loaded in, and the flags that differ from TRL's own defaults.
TRL: dict[str, tuple[str, dict[str, Any]]] = {
    "trl_defaults": ("float32", {}),
    "trl_best": ("bfloat16", {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}),
}


def run_trl(name: str, stage: str, rows: Path, model_dir: str) -> dict[str, Any]:
    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl.trainer.dpo_config import DPOConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_config import SFTConfig
    from trl.trainer.sft_trainer import SFTTrainer

    dtype, flags = TRL[name]
    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[stage]
    special = {"assistant_only_loss": False} if stage == "sft" else {"precompute_ref_log_probs": name == "trl_best"}
    if stage == "dpo":
        flags = {k: v for k, v in flags.items() if k != "train_sampling_strategy"}
    marks: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            marks.append(time.perf_counter())

    with tempfile.TemporaryDirectory() as out:
        arguments = config(
            output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(), bf16=False, learning_rate=1e-4, max_length=1024, seed=0,
            disable_tqdm=True, lr_scheduler_type="constant", **special, **flags,
        )  # fmt: skip
        began = time.perf_counter()
        data = load_dataset("json", data_files=str(rows), split="train")
        if stage == "sft":
            data = data.map(lambda r: {"prompt": r["messages"][:1], "completion": r["messages"][1:]}, remove_columns=["messages"])
        model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=getattr(torch, dtype))
        tokenizer = AutoTokenizer.from_pretrained(model_dir)
        job = trainer(
            model=model, args=arguments, train_dataset=data, processing_class=tokenizer, peft_config=LoraConfig(**LORA),
            callbacks=[Clock()],
        )  # fmt: skip
        job.train()
    steps = [b - a for a, b in zip(marks[::2], marks[1::2], strict=True)]
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    return {"step_seconds": steps, "setup_seconds": marks[0] - began, "losses": losses}


def run_posttrain(stage: str, rows: Path, model_dir: str) -> dict[str, Any]:
    import posttrain

    with tempfile.TemporaryDirectory() as out:
        began = time.perf_counter()
        posttrain.run(
            stage, "+peft=lora", f"model.name={model_dir}", "peft.r=8", "peft.alpha=16", f"data.path={rows}", "data.eval_share=0",
            "eval.sets=null", f"train.batch_size={BATCH}", "train.grad_accum=1", "train.epochs=1", "train.save_steps=null",
            "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_ratio=0", f"run.dir={out}/run",
        )  # fmt: skip
        whole = time.perf_counter() - began
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "train/loss" in line]
    tokens = [b["tokens"] - a for a, b in zip([0, *(s["tokens"] for s in steps)], steps, strict=False)]
    seconds = [n / step["train/tokens_per_second"] for n, step in zip(tokens, steps, strict=True)]
    return {
        "step_seconds": seconds,
        "setup_seconds": whole - sum(seconds),
        "losses": [s["train/loss"] for s in steps],
        "tokens": tokens,
    }


def main() -> None:
    name, stage, rows, model_dir = sys.argv[1:]
    found = run_posttrain(stage, Path(rows), model_dir) if name == "posttrain" else run_trl(name, stage, Path(rows), model_dir)
    found["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
