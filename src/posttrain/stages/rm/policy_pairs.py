"""Preference pairs of a policy's own making: its answers to the data's prompts, the best and the worst by a rule."""

from __future__ import annotations

import json
from pathlib import Path

from posttrain.config.schema import DataConfig
from posttrain.console import Meter, say
from posttrain.data.chat.options import options_of
from posttrain.data.prepare import canonical_rows
from posttrain.data.row_use import RowUse
from posttrain.data.rows import prompt_of, reference_of
from posttrain.errors import UserError
from posttrain.models.language.generation import Sampling, sample
from posttrain.models.language.loading import device_here, load_model
from posttrain.models.language.packed_lm import PackedLM
from posttrain.rewards import RewardFunction, best_and_worst, load_function
from posttrain.runs.artifact import open_artifact
from posttrain.runs.files import write_text
from posttrain.stages.rm.config import Rm
from posttrain.training.seeding import seed_step

# of the data's rows, where a policy answers them
PROMPTS = RowUse(
    name="rm.policy",
    takes=("prompts", "messages", "prompt_completion", "pairs"),
    examples="prompts",
    needs="prompts: prompt alone, messages, instruction and output, prompt and completion, or prompt, chosen and rejected",
)
PAIRS = "pairs.jsonl"  # in the run's directory
AT_ONCE = 32  # answers that are written at a time


def own_pairs(cfg: Rm, path: Path) -> DataConfig:
    """Data of the file at `path`, which is written first if it is not there: `rm.samples` answers of `rm.policy` to each prompt
    of `data`, ranked by `rm.rule`. Raises UserError where the policy is no run that writes."""
    assert cfg.rm.policy and cfg.rm.rule
    rule = load_function(cfg.rm.rule, "rm.rule")
    policy = open_artifact(cfg.rm.policy, "rm.policy")
    directory = policy.directory or Path(cfg.rm.policy)
    if not policy.is_run or policy.reward_head:
        raise UserError(f"rm.policy: {directory} is no finished run of a model that writes; give an sft, ppo or dpo run")
    if not path.exists():
        write_text(path, "".join(json.dumps(pair) + "\n" for pair in _pairs(cfg, directory, rule)))
    return data_of_pairs(cfg.data, path)


def data_of_pairs(data: DataConfig, path: Path) -> DataConfig:
    """`data` of a stage whose pairs a policy has written to `path`."""
    return data.model_copy(
        update={"path": str(path), "shape": "pairs", "columns": None, "quality": None}
        | {"eval_path": None, "skip_rows": 0, "max_rows": None}
        | ({} if data.eval_share else {"eval_share": 0.1})
    )


def _pairs(cfg: Rm, directory: Path, rule: RewardFunction) -> list[dict[str, object]]:
    live = load_model(directory, device_here())
    encoder = live.encoder.reading_as(options_of(cfg.data))
    sampling = Sampling(cfg.rm.max_new_tokens, 1.0, 1.0, 0, AT_ONCE)
    room = cfg.train.max_length - cfg.rm.max_new_tokens
    rows = [(row, encoder.encode_prompt(row)) for _, row in canonical_rows(cfg.data, PROMPTS)]
    rows = [(row, tokens) for row, tokens in rows if len(tokens) <= room]
    lm = PackedLM(live.model, kernels=live.kernels)
    found, ties = [], 0
    with Meter("answers", -(-len(rows) // AT_ONCE)) as meter:
        for start in range(0, len(rows), AT_ONCE):
            some = rows[start : start + AT_ONCE]
            seed_step(cfg.train.seed, start, 0)
            drawn = sample(lm, [tokens for _, tokens in some], cfg.rm.samples, sampling, encoder.end_tokens())
            for (row, tokens), answers in zip(some, drawn, strict=True):
                texts = [live.tokenizer.decode(answer.tokens, skip_special_tokens=True) for answer in answers]
                prompts = [live.tokenizer.decode(tokens)] * len(texts)
                columns = {name: [value] * len(texts) for name, value in row.get("columns", {}).items()}
                if made := best_and_worst(rule(prompts, texts, [reference_of(row)] * len(texts), columns)):
                    best, worst = made
                    pair = {"prompt": prompt_of(row), "chosen": texts[best], "rejected": texts[worst]}
                    found.append(pair | {"weight": row.get("weight", 1.0)} | ({"tools": row["tools"]} if "tools" in row else {}))
                else:
                    ties += 1
            meter.advance()
    say(f"{len(found)} pairs of answers by {directory}, ranked by {cfg.rm.rule}; {ties} prompts had none that was better")
    if not found:
        raise UserError("rm.rule: it finds no answer better than another; give another rule, or raise rm.samples")
    return found
