"""A base of a large shape, of random numbers, made layer by layer; and one step of QLoRA on it with `train.offload=layers`.

    python scripts/offload_8b.py FOLDER [--layers 32] [--length 64] [--offload layers] [--alike]

--alike: all layers have the same numbers, which are drawn once.

FOLDER gets the model (16 GB at 32 layers) and the cache (4 GB). What is said at the end is the most memory that the run's process
has had resident, mapped pages of files counted, in its first start, which makes the layers' files, and in a second one.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.models.hub import resolve

CONFIG = {  # Llama 3.1 8B's shape
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
    "max_position_embeddings": 8192, "tie_word_embeddings": False, "hidden_act": "silu", "dtype": "bfloat16",
}  # fmt: skip
WIDTH, INNER, KEYS, WORDS = 4096, 14336, 1024, 128256
LINEARS = {
    "self_attn.q_proj": (WIDTH, WIDTH), "self_attn.k_proj": (KEYS, WIDTH), "self_attn.v_proj": (KEYS, WIDTH),
    "self_attn.o_proj": (WIDTH, WIDTH), "mlp.gate_proj": (INNER, WIDTH), "mlp.up_proj": (INNER, WIDTH),
    "mlp.down_proj": (WIDTH, INNER),
}  # fmt: skip
ROWS = 3  # of which one is held out


def random(*shape: int) -> Tensor:
    """Of a spread that keeps activations in bounds."""
    return torch.empty(*shape, dtype=torch.bfloat16).normal_(0, 0.02)


def make_model(folder: Path, layers: int, alike: bool) -> Path:
    """A file a layer, each written before the next is made; with the tokenizer of the smallest model."""
    model = folder / f"model-{layers}"
    if (model / "config.json").exists():
        return model
    shutil.rmtree(model, ignore_errors=True)
    model.mkdir(parents=True)
    for file in resolve("tiny", None).directory.glob("token*"):
        shutil.copy(file, model)
    drawn: dict[str, Tensor] = {}
    for i in range(layers):
        if not (drawn and alike):
            drawn = {name: random(*shape) for name, shape in LINEARS.items()}
        tensors = {f"model.layers.{i}.{name}.weight": value for name, value in drawn.items()}
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors |= {f"model.layers.{i}.{name}.weight": torch.ones(WIDTH, dtype=torch.bfloat16) for name in norms}
        save_file(tensors, model / f"layer-{i:03}.safetensors", metadata={"format": "pt"})
    rest = {"model.embed_tokens.weight": random(WORDS, WIDTH), "lm_head.weight": random(WORDS, WIDTH)}
    save_file(
        rest | {"model.norm.weight": torch.ones(WIDTH, dtype=torch.bfloat16)},
        model / "rest.safetensors",
        metadata={"format": "pt"},
    )
    (model / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": layers}, indent=2))
    return model


def make_rows(folder: Path, length: int) -> Path:
    """Rows that are longer than `length`, and are cut to it."""
    path = folder / "rows.jsonl"
    texts = [f"{i} " + " ".join(f"word{i * length + j}" for j in range(length)) for i in range(ROWS)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def run(folder: Path, model: Path, rows: Path, length: int, offload: str, name: str) -> dict[str, float]:
    """One start: what its manifest says of memory and time."""
    out = folder / name
    shutil.rmtree(out, ignore_errors=True)
    words = [
        f"model.name={model}", f"data.path={rows}", "+peft=qlora", "peft.r=8", f"train.offload={offload}", "train.max_steps=1",
        "train.batch_size=1", "train.grad_accum=1", f"train.max_length={length}", "data.eval_rows=1", "eval.sets=null",
        f"run.dir={out}",
    ]  # fmt: skip
    began = time.monotonic()
    environment = os.environ | {"POSTTRAIN_CACHE": str(folder / "cache")}
    subprocess.run([sys.executable, "-m", "posttrain", "cpt", *words], env=environment, check=True)
    manifest = json.loads((out / "manifest.json").read_text())
    return {"peak_GB": manifest["peak_memory_bytes"] / 1e9, "step_s": manifest["seconds"], "all_s": time.monotonic() - began}


def main() -> None:
    """Make, run twice, and say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--length", type=int, default=64)
    parser.add_argument("--offload", default="layers")
    parser.add_argument("--alike", action="store_true")
    asked = parser.parse_args()
    model = make_model(asked.folder, asked.layers, asked.alike)
    rows = make_rows(asked.folder, asked.length)
    size = sum(file.stat().st_size for file in model.glob("*.safetensors"))
    print(f"{asked.layers} layers, {size / 1e9:.1f} GB in 16 bit")
    for name in ("first", "second"):
        found = run(asked.folder, model, rows, asked.length, asked.offload, name)
        print(re.sub(r"[{}']", "", str({"start": name} | {key: round(value, 2) for key, value in found.items()})), flush=True)


if __name__ == "__main__":
    main()
