"""One measured run of one contender, in a process of its own: prints a JSON line with seconds, losses and peak memory.

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

BEGAN = time.perf_counter()
BATCH = 4
LORA = {"r": 8, "lora_alpha": 16, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
# What each name means for TRL: the dtype the weights are loaded in, and the flags that differ from TRL's own defaults.
# Packing and padding-free are not among them: both ask for FlashAttention, which is not to be had on a CPU.
TRL: dict[tuple[str, str], tuple[str, dict[str, Any]]] = {
    ("trl_defaults", "sft"): ("float32", {}),
    ("trl_defaults", "dpo"): ("float32", {}),
    ("trl_best", "sft"): ("bfloat16", {"gradient_checkpointing": False, "train_sampling_strategy": "group_by_length"}),
    ("trl_best", "dpo"): ("bfloat16", {"gradient_checkpointing": False, "precompute_ref_log_probs": True}),
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

    dtype, flags = TRL[name, stage]
    config, trainer = {"sft": (SFTConfig, SFTTrainer), "dpo": (DPOConfig, DPOTrainer)}[stage]
    steps: list[float] = []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            steps.append(-time.perf_counter())

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            steps[-1] += time.perf_counter()

    with tempfile.TemporaryDirectory() as out:
        arguments = config(
            output_dir=out, per_device_train_batch_size=BATCH, num_train_epochs=1, logging_steps=1, save_strategy="no",
            report_to=[], use_cpu=not torch.cuda.is_available(), learning_rate=1e-4, max_length=1024, seed=0, disable_tqdm=True,
            lr_scheduler_type="constant", **flags,
        )  # fmt: skip
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
        job.save_model(out)
    losses = [entry["loss"] for entry in job.state.log_history if "loss" in entry]
    return {"steps": sum(steps), "loss": sum(losses) / len(losses)}


def run_posttrain(stage: str, rows: Path, model_dir: str) -> dict[str, Any]:
    import posttrain

    with tempfile.TemporaryDirectory() as out:
        manifest = posttrain.run(
            stage, "+peft=lora", f"model.name={model_dir}", "peft.r=8", "peft.alpha=16", f"data.path={rows}", "data.eval_share=0",
            "eval.sets=null", f"train.batch_size={BATCH}", "train.grad_accum=1", "train.epochs=1", "train.max_length=1024",
            "train.save_steps=null", "optim.lr=1e-4", "optim.schedule=constant", "optim.warmup_ratio=0", f"run.dir={out}/run",
        )  # fmt: skip
        lines = [json.loads(line) for line in (Path(out) / "run" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return {"steps": manifest["seconds"], "loss": sum(losses) / len(losses), "tokens": manifest["tokens"]}


def main() -> None:
    name, stage, rows, model_dir = sys.argv[1:]
    found = run_posttrain(stage, Path(rows), model_dir) if name == "posttrain" else run_trl(name, stage, Path(rows), model_dir)
    found |= {"whole": time.perf_counter() - BEGAN, "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
    print("RESULT " + json.dumps(found))


if __name__ == "__main__":
    main()
