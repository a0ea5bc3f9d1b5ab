"""Does a change of the code change any number? Small runs of everything, recorded to the last bit and compared.

    python scripts/golden.py record golden.json      # on the commit that is right
    python scripts/golden.py compare golden.json     # after a change: says what differs, exit code 1 where anything does

Every case goes through the command line with `model=tiny`. Of a run the record has each line of metrics.jsonl and the manifest
without times, versions and places, the sha256 of the result's weights, and the resolved config. The figures hold for one machine
and one set of library versions: record and compare side by side.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

SMALL = ["model=tiny", "train.max_steps=3", "train.batch_size=2", "data.max_rows=40", "data.eval_rows=4", "eval.rows=4"]
SMALL += ["optim.lr=0.01", "train.max_length=256"]
PPO = ["model=tiny", "train.max_steps=2", "train.batch_size=2", "train.grad_accum=4", "data.max_rows=60", "data.eval_rows=4"]
PPO += ["eval.rows=4", "rollout.max_new_tokens=12", "optim.lr=0.01", "train.max_length=256"]
PICTURES = ["model=tiny", "data.instance_dir=photos", "data.instance_prompt=a sks dog", "data.class_prompt=a dog"]
PICTURES += ["sample.images=0", "eval.images=2", "eval.levels=2", "prior.inference_steps=2", "prior.images=3"]
PICTURES += ["train.max_steps=3", "train.batch_size=2"]
REWARDS = "reward.function=posttrain.rules:brevity"
VOLATILE = re.compile(r"second|_per_|peak_memory|^time$|^path$|^digest$|^code$|^versions$|^device$|^files$|^made_with$|^source$")

# name -> words of the command line; {NAME} is another case's directory
Cases = dict[str, list[str]]


def language_cases() -> Cases:
    lora = ["+peft=lora", "peft.r=4"]
    found: Cases = {
        "cpt-full": ["cpt", *SMALL],
        "sft-full": ["sft", *SMALL, "train.eval_steps=2"],
        "sft-lora": ["sft", *SMALL, *lora, "train.grad_accum=2", "optim.schedule=linear"],
        "sft-qlora": ["sft", *SMALL, "+peft=qlora", "peft.r=4"],
        "sft-dropout": ["sft", *SMALL, *lora, "peft.dropout=0.2"],
        "sft-int8": ["sft", *SMALL, *lora, "quant=int8"],
        "sft-dense": ["sft", *SMALL, "+peft=qlora", "peft.r=4", "quant.dense_layers=1"],
        "sft-recompute": ["sft", *SMALL, *lora, "train.gradient_checkpointing=true"],
        "sft-attention": ["sft", *SMALL, *lora, "model.attention=dense"],
        "sft-float32": ["sft", *SMALL, *lora, "model.dtype=float32", "optim.weight_decay=0.1"],
        "sft-weights": ["sft", *SMALL, *lora, "weights.earlier_turns=0.5", "weights.gamma=0.01", "weights.l_max=20"],
        "sft-cot": ["sft", *SMALL, *lora, "data.path=reasons.jsonl", "cot.marker='####'", "cot.reasoning_weight=0.5"],
        "sft-quality": ["sft", *SMALL, *lora, "data.path=rated.jsonl", "data.quality=weight"],
        "sft-resumed": ["sft", *SMALL, *lora, "peft.dropout=0.1", "run.stop_after=1"],
        "sft-spikes": ["sft", *SMALL, *lora, "train.spike_mads=8", "train.skip_nonfinite=1"],
        "cpt-lora": ["cpt", *SMALL, *lora],
        "cpt-mix": ["cpt", *SMALL, *lora, "data.path=builtin:reference", "data.alpha=0.5", "data.general.path=general.jsonl"],
        "cpt-replay": ["cpt", *SMALL, *lora, "data.alpha=0.6", "data.replay.tokens=300", "data.replay.max_new_tokens=32"],
        "sft-mixture": [
            "sft",
            *SMALL,
            *lora,
            "data=mix",
            "data.sources.a.path=builtin:questions",
            "data.sources.a.share=0.7",
            "data.sources.b.path=rated.jsonl",
            "data.sources.b.share=0.3",
        ],
        "cpt-curriculum": ["cpt", *SMALL, *lora, "curriculum.by=perplexity"],
        "sft-curriculum": ["sft", *SMALL, *lora, "curriculum.by=length", "curriculum.beta_end=-2"],
        "cpt-ewc": ["cpt", *SMALL, *lora, "ewc.lambda=10", "ewc.path=general.jsonl", "ewc.rows=6", "ewc.max_length=64"],
        "cpt-l2": ["cpt", *SMALL, "ewc.lambda=0.1", "ewc.importance=l2"],
        "cpt-budget": ["cpt", *SMALL, *lora, "forgetting.budget=0.001", "forgetting.action=stop", "train.save_steps=1"],
        "chain-stack": ["sft", *SMALL, *lora, "init={cpt-lora}", "chain.mode=stack"],
        "chain-merge": ["sft", *SMALL, *lora, "init={cpt-lora}", "chain.mode=merge"],
        "chain-continue": ["sft", *SMALL, *lora, "init={cpt-lora}", "chain.mode=continue"],
        "chain-full": ["sft", *SMALL, "init={cpt-lora}"],
        "chain-of-full": ["sft", *SMALL, *lora, "init={cpt-full}"],
        "dpo-full": ["dpo", *SMALL],
        "dpo-chain": ["dpo", *SMALL, *lora, "init={chain-stack}"],
        "dpo-resumed": ["dpo", *SMALL, *lora, "init={cpt-lora}", "run.stop_after=2", "ewc.lambda=1", "ewc.importance=l2"],
        "dpo-ipo": ["dpo", *SMALL, *lora, "dpo.loss=ipo", "init={sft-lora}"],
        "dpo-norm": ["dpo", *SMALL, *lora, "dpo.loss=sigmoid_norm"],
        "dpo-smooth": ["dpo", *SMALL, *lora, "dpo.label_smoothing=0.1", "init={sft-qlora}", "quant=nf4"],
        "rm-lora": ["rm", *SMALL, *lora, "init={sft-lora}"],
        "rm-full": ["rm", *SMALL, "rm.centering=0.01"],
        "rm-policy": [
            "rm",
            *SMALL,
            *lora,
            "rm.policy={sft-lora}",
            "rm.rule=posttrain.rules:overlap",
            "rm.samples=2",
            "rm.max_new_tokens=8",
            "data.path=builtin:questions",
            "data.max_rows=16",
        ],
    }
    for method in ("rslora", "loraplus", "pissa", "dora", "adalora"):
        found[f"sft-{method}"] = ["sft", *SMALL, f"+peft={method}", "peft.r=4"]
    found["sft-adalora"] += ["peft.init_r=6", "train.max_steps=12"]
    found["sft-vera"] = ["sft", *SMALL, "+peft=vera", "peft.r=8"]
    found["sft-adapter"] = ["sft", *SMALL, "+peft=adapter", "peft.r=8"]
    found["sft-pfeiffer"] = ["sft", *SMALL, "+peft=adapter", "peft.r=8", "peft.placement=pfeiffer"]
    for method in ("prefix", "prompt", "ptuning"):
        found[f"sft-{method}"] = ["sft", *SMALL, f"+peft={method}", "peft.length=4"]
    found["sft-head"] = ["sft", *SMALL, "+peft=head"]
    found["sft-partial"] = ["sft", *SMALL, "+peft=partial", "peft.layers=1"]
    for method in ("dora", "prefix", "adapter", "vera"):
        found[f"chain-{method}"] = ["sft", *found[f"sft-{method}"][1:], f"init={{sft-{method}}}", "chain.mode=continue"]
    found["dpo-prefix"] = ["dpo", *SMALL, "+peft=prefix", "peft.length=4"]
    found["dpo-pissa"] = ["dpo", *SMALL, "+peft=pissa", "peft.r=4", "init={sft-lora}"]
    return found


def other_cases() -> Cases:
    """In a process of their own, beside the language cases: PPO, pictures, recipes, sweeps and what comes after a run."""
    lora, rm = ["+peft=lora", "peft.r=4"], ["init={o-sft}", "init_reward={o-rm}"]
    return {
        "o-sft": ["sft", *SMALL, *lora],
        "o-cpt": ["cpt", *SMALL, *lora],
        "o-rm": ["rm", *SMALL, *lora, "init={o-sft}"],
        "ppo-gae": ["ppo", *PPO, *lora, *rm],
        "ppo-target": [
            "ppo",
            *PPO,
            *lora,
            *rm,
            "ppo.target_kl=1",
            "ppo.kl_estimator=k3",
            "ppo.entropy_coef=0.01",
            "reward.whiten=true",
            "reward.clip=1",
            "reward.gold=posttrain.rules:overlap",
            "train.eval_steps=1",
        ],
        "ppo-grpo": ["ppo", *PPO, *lora, "init={o-sft}", REWARDS, "ppo.advantage=grpo", "ppo.samples=3"],
        "ppo-rloo": ["ppo", *PPO, "+peft=qlora", "peft.r=4", REWARDS, "ppo.advantage=rloo", "ppo.samples=2"],
        "ppo-full": ["ppo", *PPO, REWARDS, "ppo.minibatches=2"],
        "ppo-top-p": ["ppo", *PPO, *lora, REWARDS, "rollout.top_p=0.9", "rollout.top_k=20", "rollout.temperature=0.7"],
        "ppo-continue": ["ppo", *PPO, *lora, *rm, "chain.mode=continue"],
        "ppo-resumed": ["ppo", *PPO, *lora, *rm, "run.stop_after=1"],
        "pictures-full": ["dreambooth", *PICTURES],
        "pictures-lora": ["dreambooth", *PICTURES, "+peft=lora", "peft.r=4"],
        "pictures-dora": ["dreambooth", *PICTURES, "+peft=dora", "peft.r=4", "dreambooth.text_encoder=true"],
        "pictures-options": [
            "dreambooth",
            *PICTURES,
            "+peft=lora",
            "peft.r=4",
            "dreambooth.min_snr=5",
            "data.flip=true",
            "dreambooth.noise_offset=0.1",
            "data.crops=2",
            "prior.weight=0.5",
        ],
        "pictures-alone": [
            "dreambooth",
            *PICTURES,
            "+peft=qlora",
            "peft.r=4",
            "prior.weight=0",
            "sample.images=1",
            "sample.inference_steps=2",
        ],
        "pictures-xl": ["dreambooth", *PICTURES, "model.name=tiny-sdxl", "+peft=lora", "peft.r=4"],
        "pictures-sd3": ["dreambooth", *PICTURES, "model.name=tiny-sd3", "+peft=lora", "peft.r=4"],
        "pictures-flux": ["dreambooth", *PICTURES, "model.name=tiny-flux", "+peft=lora", "peft.r=4"],
        "recipe": ["run", "recipe.yaml", "run.dir={recipe}"],
        "sweep": ["sft", "-m", *SMALL, "+peft=lora", "peft.r=2,4", "run.dir={sweep}"],
        "merge": ["merge", "{o-sft}", "--out", "{merge}", "--max-kl", "9"],
        "compose": ["compose", "{o-sft}", "{o-cpt}", "--weights", "0.7,0.3", "--out", "{compose}"],
        "merge-pictures": ["merge", "{pictures-lora}", "--out", "{merge-pictures}", "--max-kl", "9"],
        "eval": ["eval", "{o-sft}", "{o-cpt}", "--json"],
        "chat": ["chat", "{o-sft}", "--prompt", "What is a list?", "--max-new-tokens", "12"],
        "plan-sft": ["plan", "sft", *SMALL, *lora, "--json", "--memory", "8GB"],
        "plan-ppo": ["plan", "ppo", *PPO, *lora, REWARDS, "--json", "--memory", "8GB"],
        "plan-dpo": ["plan", "dpo", *SMALL, "+peft=qlora", "--json", "--memory", "8GB"],
        "plan-pictures": ["plan", "dreambooth", *PICTURES, "+peft=lora", "peft.r=4", "--json", "--memory", "8GB"],
        "preview-sft": ["preview", "sft", *SMALL, "--page", "{preview-sft}.html"],
        "preview-dpo": ["preview", "dpo", *SMALL, "--page", "{preview-dpo}.html"],
        "preview-ppo": ["preview", "ppo", *PPO, REWARDS, "--page", "{preview-ppo}.html"],
    }


STAGES = ("cpt", "sft", "rm", "ppo", "dpo", "dreambooth")
STOPPED = 75
RECIPE = """
name: golden
description: three stages
overrides: [{words}, +peft=lora, peft.r=4]
steps:
  cpt:
  sft:
  dpo:
    overrides: [dpo.beta=0.2]
"""


def make_files(folder: Path) -> None:
    """The data of the cases, always the same."""
    import numpy as np
    from PIL import Image

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    write("general.jsonl", [{"text": f"The {i}th thing to say is that {i} follows {i - 1}."} for i in range(60)])
    write("reasons.jsonl", [{"prompt": f"{i}+1?", "completion": f"one more than {i}\n#### {i + 1}"} for i in range(60)])
    write("rated.jsonl", [{"prompt": f"say {i}", "completion": f"it is {i}", "quality": 1 + i % 5} for i in range(60)])
    (folder / "recipe.yaml").write_text(RECIPE.format(words=", ".join(SMALL)))
    (folder / "photos").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    for i in range(4):
        Image.fromarray(rng.integers(0, 255, (40, 32, 3), dtype=np.uint8)).save(folder / "photos" / f"{i}.png")


def stable(value: Any) -> Any:
    """Without what another moment or machine changes."""
    if isinstance(value, dict):
        return {key: stable(each) for key, each in sorted(value.items()) if not VOLATILE.search(key)}
    return [stable(each) for each in value] if isinstance(value, list) else value


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def record_of(directory: Path) -> dict[str, Any]:
    """What is recorded of one run, or of a directory of weights."""
    import yaml

    found: dict[str, Any] = {"weights": {str(p.relative_to(directory)): sha256(p) for p in sorted(weights_in(directory))}}
    if (directory / "metrics.jsonl").exists():
        found["metrics"] = [stable(json.loads(line)) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    if (directory / "manifest.json").exists():
        manifest = json.loads((directory / "manifest.json").read_text().replace(str(Path.cwd()), "."))
        for key in ("identity", "config_digest", "base"):
            manifest.pop(key, None)
        found["manifest"] = stable(manifest)
    if (directory / "config.yaml").exists():
        found["config"] = yaml.safe_load((directory / "config.yaml").read_text().replace(str(Path.cwd()), "."))
    for name in ("samples.json", "held_out.json"):
        if (directory / name).exists():
            found[name] = json.loads((directory / name).read_text())
    return found


def weights_in(directory: Path) -> Iterator[Path]:
    for path in directory.rglob("*.safetensors"):
        if "checkpoints" not in path.parts:
            yield path


def run_case(name: str, words: list[str]) -> Any:
    """Through the command line, in this process."""
    from typer.testing import CliRunner

    from posttrain.cli import app

    words = [re.sub(r"\{([\w-]+)\}", r"runs/\1", word) for word in words]
    if words[0] in STAGES and "-m" not in words:
        words.append(f"run.dir=runs/{name}")
    began = time.monotonic()
    result = CliRunner().invoke(app, words)
    while result.exit_code == STOPPED and time.monotonic() - began < 60:  # the same command goes on
        result = CliRunner().invoke(app, words)
    print(f"{name:<18}{time.monotonic() - began:6.1f} s  exit {result.exit_code}", file=sys.stderr, flush=True)
    if result.exit_code:
        return {"exit": result.exit_code, "said": result.output.splitlines()[-1:], **record_of(Path("runs") / name)}
    if name == "recipe":
        return {p.name: record_of(p) for p in sorted(Path("runs/recipe").iterdir()) if (p / "manifest.json").exists()}
    if name == "sweep":
        return {p.parent.name: record_of(p.parent) for p in sorted(Path("runs/sweep").glob("*/manifest.json"))}
    if words[0] in ("eval", "plan"):
        return stable(json.loads(result.stdout))
    if words[0] == "preview":
        return [line for line in result.output.splitlines() if "runs/" not in line]
    if words[0] == "chat":
        return result.stdout.splitlines()[-1]
    return record_of(Path("runs") / name)


def run_group(group: str, only: str | None) -> dict[str, Any]:
    cases = language_cases() if group == "language" else other_cases()
    chosen = {name: words for name, words in cases.items() if only is None or re.search(only, name)}
    wanted = set(chosen)
    while more := {need for name in wanted for word in cases[name] for need in re.findall(r"\{([\w-]+)\}", word)} - wanted:
        wanted |= more & set(cases)
        if not more & set(cases):
            break
    return {name: run_case(name, words) for name, words in cases.items() if name in wanted}


def run_all(only: str | None) -> dict[str, Any]:
    """Two groups side by side, each in a process and folder of its own, over one cold cache."""
    with tempfile.TemporaryDirectory(prefix="golden-") as place:
        root = Path(place)
        environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        children = []
        for group in ("language", "other"):
            folder = root / group
            folder.mkdir()
            make_files(folder)
            command = [sys.executable, str(Path(__file__).resolve()), "group", group, *(["--only", only] if only else [])]
            mine = {**environment, "POSTTRAIN_CACHE": str(folder / "cache")}
            children.append((folder, subprocess.Popen(command, cwd=folder, env=mine)))
        if any(child.wait() for _, child in children):
            raise SystemExit("a group of cases ended early; its words are above")
        return {name: each for folder, _ in children for name, each in json.loads((folder / "found.json").read_text()).items()}


def differences(then: Any, now: Any, where: str = "") -> Iterator[str]:
    if isinstance(then, dict) and isinstance(now, dict):
        for key in {**then, **now}:
            yield from differences(then.get(key, "(absent)"), now.get(key, "(absent)"), f"{where}/{key}")
    elif isinstance(then, list) and isinstance(now, list) and len(then) == len(now):
        for i, (a, b) in enumerate(zip(then, now, strict=True)):
            yield from differences(a, b, f"{where}/{i}")
    elif then != now:
        yield f"{where}: {str(then)[:120]} -> {str(now)[:120]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("record", "compare", "group"))
    parser.add_argument("file", help="the record")
    parser.add_argument("--only", help="a regular expression of the cases' names")
    parser.add_argument("--renamed", action="append", default=[], help="old=new: a key that has another name now")
    parser.add_argument("--ignore", help="a regular expression of differences that are meant")
    args = parser.parse_args()
    if args.what == "group":
        Path("found.json").write_text(json.dumps(run_group(args.file, args.only)))
        return 0
    found = run_all(args.only)
    if args.what == "record":
        Path(args.file).write_text(json.dumps(found, sort_keys=True, separators=(",", ":")).replace('},"', '},\n"') + "\n")
        failed = [name for name, each in found.items() if isinstance(each, dict) and "exit" in each]
        print(f"{len(found)} cases{', of which failed: ' + ', '.join(failed) if failed else ''}")
        return 0
    recorded = Path(args.file).read_text()
    for pair in args.renamed:
        old, new = pair.split("=")
        recorded = re.sub(rf'(?<=["/.]){re.escape(old)}(?=["=])', new, recorded)
    then = {name: each for name, each in json.loads(recorded).items() if not args.only or name in found}
    lines = [line for line in differences(then, found) if not (args.ignore and re.search(args.ignore, line))]
    for line in lines:
        print(line)
    print(f"{len(found)} cases: {'identical' if not lines else f'{len(lines)} differences'}")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
