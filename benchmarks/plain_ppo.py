"""PPO as one writes it with transformers and peft alone, now that TRL has none: two models, padded batches, whole logits."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from posttrain.rewards import code_spans

EPOCHS, MINIBATCHES, STEPS, KL = 2, 2, 2, 0.05


def run_plain_ppo(name: str, rows: Path, model_dir: str, batch: int, rank: int, new_tokens: int) -> dict[str, Any]:
    """name: trl_defaults for float32 weights, trl_best for bfloat16. Two steps of 2 * batch prompts, as posttrain's."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    dtype = torch.bfloat16 if name == "trl_best" else torch.float32
    tokenizer = AutoTokenizer.from_pretrained(model_dir, padding_side="left")
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    policy: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype), config)
    critic: Any = get_peft_model(AutoModelForCausalLM.from_pretrained(model_dir, dtype=dtype), config)
    score = nn.Linear(critic.config.hidden_size, 1, bias=False)
    nn.init.zeros_(score.weight)
    trained = [p for part in (policy, critic, score) for p in part.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    messages = [json.loads(line)["messages"][:1] for line in rows.read_text().splitlines()]
    seconds = {"rollout": 0.0, "update": 0.0}
    written = learnt = 0
    losses = []
    for step in range(STEPS):
        chosen = [messages[(2 * batch * step + i) % len(messages)] for i in range(2 * batch)]
        began = time.perf_counter()
        lesson = _rollout(policy, critic, score, tokenizer, chosen, new_tokens)
        seconds["rollout"] += time.perf_counter() - began
        written += int(lesson["mask"].sum())
        began = time.perf_counter()
        for _ in range(EPOCHS):
            for rows_of in torch.randperm(2 * batch).chunk(MINIBATCHES):
                part = {key: value[rows_of] if isinstance(value, Tensor) else value for key, value in lesson.items()}
                loss = _loss(policy, critic, score, part)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(trained, 1.0)
                optimizer.step()
                optimizer.zero_grad()
                losses.append(float(loss))
                learnt += int(part["seen"].sum())
        seconds["update"] += time.perf_counter() - began
    return {
        "steps": sum(seconds.values()),
        "loss": sum(losses) / len(losses),
        "rollout_tokens_per_second": written / seconds["rollout"],
        "update_tokens_per_second": learnt / seconds["update"],
    }


def _rollout(policy: Any, critic: Any, score: nn.Linear, tokenizer: Any, chosen: list[Any], new_tokens: int) -> dict[str, Any]:
    texts = [tokenizer.apply_chat_template(each, tokenize=False, add_generation_prompt=True) for each in chosen]
    inputs = tokenizer(texts, return_tensors="pt", padding=True, add_special_tokens=False)
    with torch.no_grad():
        tokens = policy.generate(
            **inputs, do_sample=True, top_k=0, max_new_tokens=new_tokens, pad_token_id=tokenizer.pad_token_id
        )
        border = inputs.input_ids.shape[1]
        answers = tokens[:, border:]
        ended = (answers == tokenizer.eos_token_id).cumsum(1)
        mask = (ended == 0) | ((ended == 1) & (answers == tokenizer.eos_token_id))
        seen = torch.cat([inputs.attention_mask, mask.long()], 1)
        lesson: dict[str, Any] = {"tokens": tokens, "seen": seen, "mask": mask, "border": border}
        lesson["old"] = _logps(policy, lesson)
        with policy.disable_adapter():
            kl = (lesson["old"] - _logps(policy, lesson)) * mask
        values = _values(critic, score, lesson)
        rewards = -KL * kl
        scores = code_spans(texts, tokenizer.batch_decode(answers, skip_special_tokens=True))
        rewards[torch.arange(len(tokens)), mask.sum(1) - 1] += torch.tensor(scores)
        lesson["advantages"], lesson["returns"] = _gae(rewards, values * mask, mask)
    return lesson


def _positions(seen: Tensor) -> Tensor:
    return (seen.cumsum(1) - 1).clamp(min=0)


def _logps(policy: Any, lesson: dict[str, Any]) -> Tensor:
    tokens, seen, border = lesson["tokens"], lesson["seen"], lesson["border"]
    logits = policy(input_ids=tokens, attention_mask=seen, position_ids=_positions(seen)).logits[:, border - 1 : -1].float()
    return logits.log_softmax(-1).gather(2, tokens[:, border:, None])[..., 0]


def _values(critic: Any, score: nn.Linear, lesson: dict[str, Any]) -> Tensor:
    tokens, seen, border = lesson["tokens"], lesson["seen"], lesson["border"]
    body = critic.get_base_model().model
    hidden = body(input_ids=tokens, attention_mask=seen, position_ids=_positions(seen)).last_hidden_state
    return score(hidden[:, border - 1 : -1].float())[..., 0]


def _gae(rewards: Tensor, values: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    advantages, carried = torch.zeros_like(values), torch.zeros(len(values))
    for t in reversed(range(values.shape[1])):
        following = values[:, t + 1] if t + 1 < values.shape[1] else torch.zeros(len(values))
        carried = rewards[:, t] + following - values[:, t] + 0.95 * carried
        advantages[:, t] = carried
    advantages, returns = advantages * mask, (advantages + values) * mask
    kept = advantages[mask]
    return (advantages - kept.mean()) / (kept.std() + 1e-8) * mask, returns


def _loss(policy: Any, critic: Any, score: nn.Linear, part: dict[str, Any]) -> Tensor:
    mask = part["mask"]
    ratio = torch.exp(_logps(policy, part) - part["old"])
    gain = torch.minimum(ratio * part["advantages"], ratio.clamp(0.8, 1.2) * part["advantages"])
    error = (_values(critic, score, part) - part["returns"]) ** 2
    return (-gain[mask].sum() + 0.05 * error[mask].sum()) / mask.sum()
